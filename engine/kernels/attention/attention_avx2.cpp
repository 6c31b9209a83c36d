#include "attention/attention_kernels.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx2,fma,f16c")

// clang-format off: the order matters
#include "simd/vector_avx2.h"
#include "simd/vector_math.h"
#include "simd/halves_avx2.h"
#include "attention/attention_core.h"
// clang-format on

const starling::AttentionKernels starling::kAttentionAvx2[] = {kernels<Float32, Floats>, kernels<Float32, Float16>,
                                                               kernels<Float32, BFloat16>};

STARLING_TARGET_END
