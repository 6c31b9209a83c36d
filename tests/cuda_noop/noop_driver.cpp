// The CUDA driver of this room: what the engine's own kernels are loaded and launched with.
#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "noop_journal.h"

namespace {

struct Config {
  unsigned grid[3], block[3], shared;
  void* stream;
  void* attributes;
  unsigned count;
};

}  // namespace

extern "C" {

int cuModuleLoadData(void** module, const void*) {
  *module = malloc(1);
  return 0;
}
int cuModuleUnload(void* module) {
  free(module);
  return 0;
}
int cuModuleGetFunction(void** function, void*, const char* name) {
  *function = strdup(name);  // lives as long as the process: functions are not given back
  noop::add_kernel(nullptr, *function, name);
  return 0;
}
int cuFuncSetAttribute(void*, int, int) { return 0; }
int cuFuncGetAttribute(int* value, int, void*) {
  *value = 0;
  return 0;
}
int cuLaunchKernelEx(const Config*, void* function, void**, void**) {
  noop::count_kernel(function, "own kernel");
  return 0;
}
int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, size_t bytes, void*) {
  noop::copy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes, "own copy");
  return 0;
}
int cuGetErrorString(int, const char** text) {
  *text = "no error is ever given";
  return 0;
}
int cuTensorMapEncodeTiled(...) { return 0; }
}
