// NEON of every 64-bit ARM processor; a cache of 16 bits is widened by FCVTL or shifts.
#include "attention/attention_kernels.h"
#include "simd/instruction_set.h"

// clang-format off: the order matters
#include "simd/vector_neon.h"
#include "simd/vector_math.h"
#include "simd/halves_neon.h"
#include "attention/attention_core.h"
// clang-format on

const starling::AttentionKernels starling::kAttentionNeon[] = {kernels<Float32, Floats>, kernels<Float32, Float16>,
                                                               kernels<Float32, BFloat16>};
