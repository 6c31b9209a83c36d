// Which kernels the x86 processor at hand can run.
#include <cpuid.h>

#include "attention/attention_kernels.h"
#include "operators/processor.h"
#include "product/block_product.h"
#include "product/half_product.h"
#include "simd/amx.h"

#if STARLING_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace starling {
namespace {

bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
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

bool has_amx_bf16() {
  if (!has_avx512() || is_held_to("avx512") || !__builtin_cpu_supports("avx512bf16")) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // EDX of leaf 7
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kAmxBf16) != 0 && (d & kAmxTile) != 0 && may_use_amx();
}

}  // namespace

bool may_use_amx() {
#if STARLING_HAS_AMX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

const HalfKernels* half_kernels(bool is_bfloat16) {
#if STARLING_HAS_AMX
  if (is_bfloat16 && has_amx_bf16()) return &kHalfAmx;
#endif
  if (has_avx512()) return is_bfloat16 ? &kBFloat16Avx512 : &kFloat16Avx512;
  if (!has_avx2()) return nullptr;
  return is_bfloat16 ? &kBFloat16Avx2 : &kFloat16Avx2;
}

const BlockKernels* block_kernels() {
  if (has_avx512() && __builtin_cpu_supports("avx512vnni")) return &kAvx512Vnni;
#ifdef STARLING_COMPILES_AVX_VNNI
  if (has_avx_vnni()) return &kAvxVnni;
#endif
  return has_avx2() ? &kAvx2 : nullptr;
}

const AttentionKernels* attention_kernels(bool reduced, CacheType type) {
  const auto at = static_cast<size_t>(type);
#if STARLING_HAS_AMX
  if (reduced && has_amx_bf16()) return &kAttentionAmx[at];
#endif
  if (reduced && has_avx512() && __builtin_cpu_supports("avx512bf16")) return &kAttentionBf16[at];
  if (has_avx512()) return &kAttentionAvx512[at];
  return has_avx2() ? &kAttentionAvx2[at] : nullptr;
}

}  // namespace starling
