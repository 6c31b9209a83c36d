// AVX-512 with BF16: vdpbf16ps multiplies 32 pairs of bfloat16 and adds neighbours into 16 float32, at twice the rate
// of float32. A score keeps eight bits of each factor, about what products of bytes around it leave of them.
#include "attention/attention_kernels.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,f16c,fma")

// clang-format off: the order matters
#include "simd/vector_avx512.h"
#include "simd/vector_math.h"
#include "simd/halves_avx512.h"
#include "attention/attention_core.h"
#include "attention/bfloat16_pairs.h"
// clang-format on

const starling::AttentionKernels starling::kAttentionBf16[] = {
    kernels<BFloat16Pairs, Floats>, kernels<BFloat16Pairs, Float16>, kernels<BFloat16Pairs, BFloat16>};

STARLING_TARGET_END
