// Which kernels the processor at hand can run.
#include <cpuid.h>

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

// STARLING_CPU_ISA=avx2 or avx-vnni takes what a processor with no more would, for tests and comparisons.
bool is_held_to(const char* instruction_set) {
  const char* most = std::getenv("STARLING_CPU_ISA");
  return most != nullptr && std::strcmp(most, instruction_set) == 0;
}

bool has_avx512() {
  if (is_held_to("avx2") || is_held_to("avx-vnni")) return false;
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

// Leaf 7, subleaf 1, bit 4 of EAX: not all compilers that know the instructions have a name to ask for them.
[[maybe_unused]] bool has_avx_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (is_held_to("avx2") || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || a < 1) return false;
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a >> 4 & 1) != 0;
}

}  // namespace

const BlockKernels* block_kernels() {
  if (has_avx512() && __builtin_cpu_supports("avx512vnni")) return &kAvx512Vnni;
#ifdef STARLING_COMPILES_AVX_VNNI
  if (has_avx_vnni()) return &kAvxVnni;
#endif
  return has_avx2() ? &kAvx2 : nullptr;
}

const AttentionKernels* attention_kernels(bool reduced) {
  if (reduced && has_avx512() && __builtin_cpu_supports("avx512bf16")) return &kAttentionBf16;
  if (has_avx512()) return &kAttentionAvx512;
  return has_avx2() ? &kAttentionAvx2 : nullptr;
}

}  // namespace starling
