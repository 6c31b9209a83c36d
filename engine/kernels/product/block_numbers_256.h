// Integers of 256 bits, which AVX2 and AVX-VNNI share. Included inside a target region, after block_product_core.h.
#pragma once

namespace starling {
namespace {

using Ints = __m256i;

int32_t store_bytes(Vector whole, int8_t* to) {
  const Ints numbers = _mm256_cvtps_epi32(whole.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

Ints all_of(int32_t number) { return _mm256_set1_epi32(number); }
Ints load_ints(const uint8_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
void store_ints(Ints a, uint8_t* to) { _mm256_store_si256(reinterpret_cast<__m256i*>(to), a); }
Ints load_numbers(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
Ints both(Ints a, Ints b) { return _mm256_and_si256(a, b); }
Ints low_nibbles(Ints a) { return both(a, all_of(0x0F0F0F0F)); }
Ints high_nibbles(Ints a) { return low_nibbles(_mm256_srli_epi16(a, 4)); }
template <int Bits>
Ints shifted_down(Ints a) {
  return _mm256_srai_epi32(a, Bits);
}
Vector to_float(Ints numbers) { return {_mm256_cvtepi32_ps(numbers)}; }
Vector from_half(const uint16_t* from) {
  return {_mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(from)))};
}

}  // namespace
}  // namespace starling
