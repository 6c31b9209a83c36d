// Eight numbers of 16 bits as floats, and back. Included inside a target region, after vector_avx2.h.
#pragma once

namespace starling {
namespace {

struct Float16 {
  static Vector load(const uint16_t* from) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)))};
  }
  static void store(Vector x, uint16_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT));
  }
  // Two inputs of 16 outputs, as HalfWeights has them.
  static void load_inputs(const uint16_t* line, Vector* even, Vector* odd) {
    for (int half = 0; half < 2; ++half) {
      even[half] = load(line + half * 8);
      odd[half] = load(line + 16 + half * 8);
    }
  }
};

struct BFloat16 {
  static Vector load(const uint16_t* from) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
  }
  // To the nearest, of two the even one; what is not a number stays none.
  static void store(Vector x, uint16_t* to) {
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256 none = _mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q);
    const __m256 chosen = _mm256_blendv_ps(_mm256_castsi256_ps(near), _mm256_castsi256_ps(quiet), none);
    const __m256i words = _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  }
  static void load_inputs(const uint16_t* line, Vector* even, Vector* odd) {
    for (int half = 0; half < 2; ++half) {
      const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + half * 16));
      even[half] = {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16))};
      odd[half] = {_mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))))};
    }
  }
};

}  // namespace
}  // namespace starling
