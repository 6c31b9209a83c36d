// Which kernels the processor at hand can run.
#include <cstdlib>
#include <cstring>

#include "attention/attention_kernels.h"
#include "product/block_product.h"

namespace starling {
namespace {

bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

// STARLING_CPU_ISA=avx2 takes what a processor without AVX-512 would, for tests and comparisons.
bool has_avx512() {
  const char* most = std::getenv("STARLING_CPU_ISA");
  if (most != nullptr && std::strcmp(most, "avx2") == 0) return false;
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

}  // namespace

const BlockKernels* block_kernels() {
  if (has_avx512() && __builtin_cpu_supports("avx512vnni")) return &kAvx512Vnni;
  return has_avx2() ? &kAvx2 : nullptr;
}

const AttentionKernels* attention_kernels(bool reduced) {
  if (reduced && has_avx512() && __builtin_cpu_supports("avx512bf16")) return &kAttentionBf16;
  if (has_avx512()) return &kAttentionAvx512;
  return has_avx2() ? &kAttentionAvx2 : nullptr;
}

}  // namespace starling
