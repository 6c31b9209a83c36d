// AVX2 has no product of bytes that cannot overflow: bytes are widened, and vpmaddwd adds pairs of 16-bit products.
#include "product/block_product.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx2,fma,f16c")

// clang-format off: the order matters
#include "simd/vector_avx2.h"
#include "simd/vector_math.h"
#include "product/projection_core.h"
#include "product/block_product_core.h"
// clang-format on

namespace starling {
namespace {

int32_t store_bytes(Vector whole, int8_t* to) {
  const __m256i numbers = _mm256_cvtps_epi32(whole.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(numbers), _mm256_extracti128_si256(numbers, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

// Eight outputs from two vectors of pairs: [o0 o0 o1 o1 o2 o2 o3 o3] and [o4 … o7].
__m256i join_pairs(__m256i low, __m256i high) { return _mm256_permute4x64_epi64(_mm256_hadd_epi32(low, high), 0xD8); }

// `Rows` rows against the 16 outputs of one tile.
template <int Rows>
void multiply_tile(const PackedWeights& weights, const QuantizedRows& rows, int row, int pair, int tile,
                   __m256 sums[Rows][2]) {
  const size_t start = static_cast<size_t>(pair) * weights.blocks, blocks = weights.blocks;
  const uint8_t* data = weights.data.data() + start * kPair * kBlock + tile * kTile * 4;
  const uint16_t* scales = weights.scales.data() + start * kPair + tile * kTile;
  for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  for (size_t block = 0; block < blocks; ++block) {
    const size_t at = row * blocks + block;
    const int8_t* values = rows.values + at * kBlock;
    __m256i pairs[Rows][4];
    for (int r = 0; r < Rows; ++r) {
      for (int quarter = 0; quarter < 4; ++quarter) pairs[r][quarter] = _mm256_setzero_si256();
    }
    for (int step = 0; step < kBlock / 4; ++step) {
      __m256i w[4];
      for (int quarter = 0; quarter < 4; ++quarter) {
        const auto* bytes = reinterpret_cast<const __m128i*>(data + step * kPair * 4 + quarter * 16);
        w[quarter] = _mm256_cvtepu8_epi16(_mm_load_si128(bytes));
      }
      for (int r = 0; r < Rows; ++r) {
        const int32_t four = load_four(values + r * blocks * kBlock + step * 4);
        const __m256i x = _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
        for (int quarter = 0; quarter < 4; ++quarter) {
          pairs[r][quarter] = _mm256_add_epi32(pairs[r][quarter], _mm256_madd_epi16(w[quarter], x));
        }
      }
    }
    for (int half = 0; half < 2; ++half) {
      const __m256 scale = _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(scales + half * 8)));
      for (int r = 0; r < Rows; ++r) {
        const __m256i correction = _mm256_set1_epi32(rows.corrections[at + r * blocks]);
        const __m256i dot = _mm256_add_epi32(join_pairs(pairs[r][half * 2], pairs[r][half * 2 + 1]), correction);
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(rows.scales[at + r * blocks]));
        sums[r][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), both, sums[r][half]);
      }
    }
    data += kPair * kBlock;
    scales += kPair;
  }
}

template <int Rows>
void multiply_rows(const PackedWeights& weights, const QuantizedRows& rows, int row, int pair,
                   const Epilogue& epilogue) {
  __m256 first[Rows][2], second[Rows][2];
  multiply_tile<Rows>(weights, rows, row, pair, 0, first);
  multiply_tile<Rows>(weights, rows, row, pair, 1, second);
  for (int half = 0; half < 2; ++half) {
    if (weights.planes == 1) {
      for (int r = 0; r < Rows; ++r) {
        finish(weights, epilogue, row + r, pair, half * 8, {first[r][half]}, {second[r][half]});
      }
    } else if constexpr (Rows == 2) {
      finish(weights, epilogue, row / 2, pair, half * 8, Vector{first[0][half]} + Vector{first[1][half]},
             Vector{second[0][half]} + Vector{second[1][half]});
    }
  }
}

}  // namespace

const BlockKernels kAvx2 = {"avx2", quantize, multiply<2>};

}  // namespace starling

STARLING_TARGET_END
