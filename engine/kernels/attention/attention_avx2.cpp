#include "attention/attention_kernels.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx2,fma")

// clang-format off: the order matters
#include "simd/vector_avx2.h"
#include "simd/vector_math.h"
#include "attention/attention_core.h"
// clang-format on

const starling::AttentionKernels starling::kAttentionAvx2 = {rotate, attend_chunk<Float32>, join};

STARLING_TARGET_END
