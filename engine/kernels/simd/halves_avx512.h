// Sixteen numbers of 16 bits as floats, and back. Included inside a target region, after vector_avx512.h.
#pragma once

namespace starling {
namespace {

struct Float16 {
  static Vector load(const uint16_t* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static void store(Vector x, uint16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Two inputs of 16 outputs, as HalfWeights has them.
  static void load_inputs(const uint16_t* line, Vector* even, Vector* odd) {
    even[0] = load(line);
    odd[0] = load(line + 16);
  }
};

struct BFloat16 {
  static Vector load(const uint16_t* from) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
  }
  // To the nearest, of two the even one; what is not a number stays none.
  static void store(Vector x, uint16_t* to) {
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i near = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    const __mmask16 none = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i chosen = _mm512_mask_or_epi32(near, none, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32(chosen, 16)));
  }
  static void load_inputs(const uint16_t* line, Vector* even, Vector* odd) {
    const __m512i both = _mm512_loadu_si512(line);
    even[0] = {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))};
    odd[0] = {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
  }
};

}  // namespace
}  // namespace starling
