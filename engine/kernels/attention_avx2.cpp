#include "attention_kernels.h"
#include "instruction_set.h"

STARLING_TARGET_BEGIN("avx2,fma")

// clang-format off: the order matters
#include "vector_avx2.h"
#include "vector_math.h"
#include "attention_core.h"
// clang-format on

const starling::AttentionKernels starling::kAttentionAvx2 = {rotate, attend_chunk<Float32>, join};

STARLING_TARGET_END
