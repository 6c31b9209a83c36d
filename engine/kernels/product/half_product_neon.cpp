#include "product/half_product.h"
#include "simd/instruction_set.h"

// clang-format off: the order matters
#include "simd/vector_neon.h"
#include "simd/vector_math.h"
#include "simd/halves_neon.h"
#include "product/projection_core.h"
#include "product/half_product_core.h"
// clang-format on

const starling::HalfKernels starling::kFloat16Neon = {"neon", prepare_floats, multiply<Float16>};
const starling::HalfKernels starling::kBFloat16Neon = {"neon", prepare_floats, multiply<BFloat16>};
