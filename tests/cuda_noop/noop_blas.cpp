// cuBLAS and cuBLASLt of this room: products are counted.
#include <cstdlib>
#include <cstring>

#include "noop_journal.h"

namespace {

int make(void** handle) {
  *handle = malloc(1);
  return 0;
}

}  // namespace

#define COUNTED(name)             \
  int name(...) {                 \
    noop::count("cuBLAS " #name); \
    return 0;                     \
  }
#define IGNORED(name) \
  int name(...) { return 0; }
#define MADE(name) \
  int name(void** handle) { return make(handle); }
#define FREED(name)        \
  int name(void* handle) { \
    free(handle);          \
    return 0;              \
  }

extern "C" {

MADE(cublasCreate_v2)
FREED(cublasDestroy_v2)
IGNORED(cublasSetStream_v2)
IGNORED(cublasSetMathMode)
IGNORED(cublasSetWorkspace_v2)
int cublasGetMathMode(void*, int* mode) {
  *mode = 0;
  return 0;
}
const char* cublasGetStatusName(int) { return "ok"; }
const char* cublasGetStatusString(int) { return "ok"; }

COUNTED(cublasDgeam)
COUNTED(cublasDgemmBatched)
COUNTED(cublasDgemmStridedBatched)
COUNTED(cublasDgemm_v2)
COUNTED(cublasDgetrfBatched)
COUNTED(cublasDgetriBatched)
COUNTED(cublasGemmBatchedEx)
int cublasGemmEx(void*, int, int, int m, int n, int k, ...) {
  noop::count("cuBLAS cublasGemmEx " + std::to_string(m) + " by " + std::to_string(n) + " over " + std::to_string(k));
  return 0;
}
COUNTED(cublasGemmStridedBatchedEx)
COUNTED(cublasScopy_v2)
COUNTED(cublasSgeam)
COUNTED(cublasSgemmBatched)
COUNTED(cublasSgemmStridedBatched)
COUNTED(cublasSgemm_v2)
COUNTED(cublasSgetrfBatched)
COUNTED(cublasSgetriBatched)
COUNTED(cublasSscal_v2)

MADE(cublasLtCreate)
FREED(cublasLtDestroy)
COUNTED(cublasLtMatmul)
COUNTED(cublasLtMatrixTransform)
IGNORED(cublasLtMatmulAlgoConfigSetAttribute)
IGNORED(cublasLtMatmulAlgoInit)
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* results, int* found) {
  constexpr size_t kResultBytes = 96;
  memset(results, 0, kResultBytes);
  *found = 1;
  return 0;
}
int cublasLtMatmulDescCreate(void** handle, ...) { return make(handle); }
FREED(cublasLtMatmulDescDestroy)
IGNORED(cublasLtMatmulDescSetAttribute)
MADE(cublasLtMatmulPreferenceCreate)
FREED(cublasLtMatmulPreferenceDestroy)
IGNORED(cublasLtMatmulPreferenceSetAttribute)
int cublasLtMatrixLayoutCreate(void** handle, ...) { return make(handle); }
FREED(cublasLtMatrixLayoutDestroy)
IGNORED(cublasLtMatrixLayoutSetAttribute)
int cublasLtMatrixTransformDescCreate(void** handle, ...) { return make(handle); }
FREED(cublasLtMatrixTransformDescDestroy)
}
