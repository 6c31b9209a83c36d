#include "product/half_product.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx2,fma,f16c")

// clang-format off: the order matters
#include "simd/vector_avx2.h"
#include "simd/vector_math.h"
#include "simd/halves_avx2.h"
#include "product/projection_core.h"
#include "product/half_product_core.h"
// clang-format on

const starling::HalfKernels starling::kFloat16Avx2 = {"avx2", prepare_floats, multiply<Float16>};
const starling::HalfKernels starling::kBFloat16Avx2 = {"avx2", prepare_floats, multiply<BFloat16>};

STARLING_TARGET_END
