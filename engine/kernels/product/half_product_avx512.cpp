#include "product/half_product.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,f16c,fma")

// clang-format off: the order matters
#include "simd/vector_avx512.h"
#include "simd/vector_math.h"
#include "simd/halves_avx512.h"
#include "product/projection_core.h"
#include "product/half_product_core.h"
// clang-format on

const starling::HalfKernels starling::kFloat16Avx512 = {"avx512", prepare_floats, multiply<Float16>};
const starling::HalfKernels starling::kBFloat16Avx512 = {"avx512", prepare_floats, multiply<BFloat16>};

STARLING_TARGET_END
