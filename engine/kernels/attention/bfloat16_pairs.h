// Products of pairs of bfloat16. Included inside a target region with AVX-512 BF16, after attention_core.h.
#pragma once

namespace starling {
namespace {

__m512i words_of(Vector low, Vector high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)); }

struct BFloat16Pairs {
  static constexpr int numbers = 2;

  static Vector multiply_add(Vector a, Vector b, Vector sum) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v))};
  }
  // out [count][head_dim / 2]: neighbouring dimensions of each row.
  static const float* queries(const float* rows, int count, int head_dim, float* out) {
    const int numbers_in_all = count * head_dim;  // a multiple of 16, so a last single vector may be left
    for (int i = 0; i < numbers_in_all; i += 2 * Vector::width) {
      const Vector::Mask mask = Vector::first(numbers_in_all - i - Vector::width);
      const __m512i words = words_of(Vector::load(rows + i), Vector::load(rows + i + Vector::width, mask));
      _mm512_mask_storeu_epi32(out + i / 2, Vector::first((numbers_in_all - i) / 2), words);
    }
    return out;
  }
  // out [head_dim / 2][kKeys]
  static void keys(const float* rows, int head_dim, int count, float* out) {
    alignas(64) float words[kKeys * kMostHeadDim / numbers];
    transpose_words(queries(rows, count, head_dim, words), head_dim / 2, count, out);
  }
  // out [kKeys / 2][head_dim]: two neighbouring keys' values; one that does not exist is zero.
  static const float* values(const float* rows, int head_dim, int count, float* out) {
    for (int key = 0; key < count; key += 2) {
      const float* low = rows + static_cast<size_t>(key) * head_dim;
      for (int d = 0; d < head_dim; d += Vector::width) {
        const Vector high = key + 1 < count ? Vector::load(low + head_dim + d) : Vector::zero();
        const __m512i both = words_of(Vector::load(low + d), high);
        const __m512i lower = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
        const __m512i upper = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
        _mm512_storeu_si512(out + static_cast<size_t>(key / 2) * head_dim + d,
                            _mm512_or_si512(lower, _mm512_slli_epi32(upper, 16)));
      }
    }
    return out;
  }
  static void store_weights(const Vector* weights, float* to) {
    for (int w = 0; w < kVectors; w += 2) {
      _mm512_storeu_si512(to + w / 2 * Vector::width, words_of(weights[w], weights[w + 1]));
    }
  }
};

// A cache of bfloat16 has its pairs already.
template <>
struct Reader<BFloat16Pairs, BFloat16> {
  static void keys(const void* from, int head_dim, int count, float*, float* out) {
    transpose_words(static_cast<const float*>(from), head_dim / 2, count, out);
  }
  static const float* values(const void* from, int head_dim, int count, float*, float* out) {
    const auto* rows = static_cast<const uint16_t*>(from);
    for (int key = 0; key < count; key += 2, rows += 2 * static_cast<size_t>(head_dim)) {
      for (int d = 0; d < head_dim; d += Vector::width) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + d));
        const __m256i high = key + 1 < count ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + head_dim + d))
                                             : _mm256_setzero_si256();
        const __m512i upper = _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16);
        _mm512_storeu_si512(out + static_cast<size_t>(key / 2) * head_dim + d,
                            _mm512_or_si512(_mm512_cvtepu16_epi32(low), upper));
      }
    }
    return out;
  }
};

}  // namespace
}  // namespace starling
