#include "attention/attention_kernels.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,fma")

// clang-format off: the order matters
#include "simd/vector_avx512.h"
#include "simd/vector_math.h"
#include "simd/halves_avx512.h"
#include "attention/attention_core.h"
// clang-format on

const starling::AttentionKernels starling::kAttentionAvx512[] = {kernels<Float32, Floats>, kernels<Float32, Float16>,
                                                                 kernels<Float32, BFloat16>};

STARLING_TARGET_END
