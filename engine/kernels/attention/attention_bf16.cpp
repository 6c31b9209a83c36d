// AVX-512 with BF16: vdpbf16ps multiplies 32 pairs of bfloat16 and adds neighbours into 16 float32, at twice the rate
// of float32. A score keeps eight bits of each factor, about what products of bytes around it leave of them.
#include "attention/attention_kernels.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")

// clang-format off: the order matters
#include "simd/vector_avx512.h"
#include "simd/vector_math.h"
#include "attention/attention_core.h"
// clang-format on

namespace starling {
namespace {

__m512i words_of(Vector low, Vector high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)); }

struct BFloat16 {
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

}  // namespace
}  // namespace starling

const starling::AttentionKernels starling::kAttentionBf16 = {rotate, attend_chunk<BFloat16>, join};

STARLING_TARGET_END
