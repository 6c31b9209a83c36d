// AVX-VNNI, of client processors without AVX-512: vpdpbusd on 256 bits.
#include "product/block_product.h"
#include "simd/instruction_set.h"

#ifdef STARLING_COMPILES_AVX_VNNI

STARLING_TARGET_BEGIN("avx2,avxvnni,fma,f16c")

// clang-format off: the order matters
#include "simd/vector_avx2.h"
#include "simd/vector_math.h"
#include "product/projection_core.h"
#include "product/block_product_core.h"
#include "product/block_numbers_256.h"
// clang-format on

namespace starling {
namespace {

Ints add_products(Ints sum, Ints bytes, Ints signed_bytes) { return _mm256_dpbusd_avx_epi32(sum, bytes, signed_bytes); }
Ints add_products_of_words(Ints sum, Ints a, Ints b) { return _mm256_dpwssd_avx_epi32(sum, a, b); }

}  // namespace
}  // namespace starling

// clang-format off: the order matters
#include "product/block_formats_vnni.h"
#include "product/block_multiply.h"
#include "product/block_panel_vnni.h"
// clang-format on

namespace starling {

const BlockKernels kAvxVnni = {"avx-vnni", 0, {0, kPair * kBlock}, false, quantize, multiply<4>, multiply_panel<4>};

}  // namespace starling

STARLING_TARGET_END

#endif
