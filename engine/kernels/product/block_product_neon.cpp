// NEON with SDOT, optional from ARMv8.2 on: 16 products of signed bytes, groups of four of which are added.
#include "product/block_product.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("arch=armv8.2-a+dotprod")

// clang-format off: the order matters
#include "simd/vector_neon.h"
#include "simd/vector_math.h"
#include "product/projection_core.h"
#include "product/block_product_core.h"
#include "product/block_numbers_neon.h"
#include "product/block_multiply.h"
// clang-format on

const starling::BlockKernels starling::kNeon = {"neon", 128, {0, 0}, false, quantize, multiply<6>, nullptr};

STARLING_TARGET_END
