// AVX-512 with VNNI: vpdpbusd multiplies 64 unsigned by signed bytes and adds groups of four into 16 int32.
#include "product/block_product.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,f16c,fma")

// clang-format off: the order matters
#include "simd/vector_avx512.h"
#include "simd/vector_math.h"
#include "product/projection_core.h"
#include "product/block_product_core.h"
// clang-format on

namespace starling {
namespace {

using Ints = __m512i;

int32_t store_bytes(Vector whole, int8_t* to) {
  const Ints numbers = _mm512_cvtps_epi32(whole.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(numbers));
  return _mm512_reduce_add_epi32(numbers);
}

Ints all_of(int32_t number) { return _mm512_set1_epi32(number); }
Ints load_ints(const uint8_t* from) { return _mm512_load_si512(from); }
void store_ints(Ints a, uint8_t* to) { _mm512_store_si512(to, a); }
Ints load_numbers(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
}
Ints both(Ints a, Ints b) { return _mm512_and_si512(a, b); }
Ints low_nibbles(Ints a) { return both(a, all_of(0x0F0F0F0F)); }
Ints high_nibbles(Ints a) { return low_nibbles(_mm512_srli_epi16(a, 4)); }
template <int Bits>
Ints shifted_down(Ints a) {
  return _mm512_srai_epi32(a, Bits);
}
Ints add_products(Ints sum, Ints bytes, Ints signed_bytes) { return _mm512_dpbusd_epi32(sum, bytes, signed_bytes); }
Ints add_products_of_words(Ints sum, Ints a, Ints b) { return _mm512_dpwssd_epi32(sum, a, b); }
Vector to_float(Ints numbers) { return {_mm512_cvtepi32_ps(numbers)}; }
Vector from_half(const uint16_t* from) {
  return {_mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(from)))};
}

}  // namespace
}  // namespace starling

// clang-format off: the order matters
#include "product/block_formats_vnni.h"
#include "product/block_multiply.h"
#include "product/block_panel_vnni.h"
// clang-format on

namespace starling {

const BlockKernels kAvx512Vnni = {"avx512-vnni", 0,           {0, kPair * kBlock}, false,
                                  quantize,      multiply<6>, multiply_panel<6>};

}  // namespace starling

STARLING_TARGET_END
