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

int32_t store_bytes(Vector whole, int8_t* to) {
  const __m512i numbers = _mm512_cvtps_epi32(whole.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(numbers));
  return _mm512_reduce_add_epi32(numbers);
}

// `Rows` rows (or planes of rows) from `row` against one pair of tiles: all sums stay in registers.
template <int Rows>
void multiply_rows(const PackedWeights& weights, const QuantizedRows& rows, int row, int pair,
                   const Epilogue& epilogue) {
  const size_t start = static_cast<size_t>(pair) * weights.blocks;
  const uint8_t* data = weights.data.data() + start * kPair * kBlock;
  const uint16_t* scales = weights.scales.data() + start * kPair;
  const size_t blocks = weights.blocks;
  __m512 sums[Rows][2];
  for (int r = 0; r < Rows; ++r) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (size_t block = 0; block < blocks; ++block) {
    const size_t at = row * blocks + block;
    __m512i dots[Rows][2];
    for (int r = 0; r < Rows; ++r) dots[r][0] = dots[r][1] = _mm512_set1_epi32(rows.corrections[at + r * blocks]);
    const int8_t* values = rows.values + at * kBlock;
#pragma GCC unroll 8
    for (int step = 0; step < kBlock / 4; ++step) {
      const __m512i left = _mm512_load_si512(data + step * 128);
      const __m512i right = _mm512_load_si512(data + step * 128 + 64);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const __m512i x = _mm512_set1_epi32(load_four(values + r * blocks * kBlock + step * 4));
        dots[r][0] = _mm512_dpbusd_epi32(dots[r][0], left, x);
        dots[r][1] = _mm512_dpbusd_epi32(dots[r][1], right, x);
      }
    }
    for (int tile = 0; tile < 2; ++tile) {
      const __m512 scale = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(scales) + tile));
      for (int r = 0; r < Rows; ++r) {
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(rows.scales[at + r * blocks]));
        sums[r][tile] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r][tile]), both, sums[r][tile]);
      }
    }
    data += kPair * kBlock;
    scales += kPair;
  }
  if (weights.planes == 1) {
    for (int r = 0; r < Rows; ++r) finish(weights, epilogue, row + r, pair, 0, {sums[r][0]}, {sums[r][1]});
    return;
  }
  for (int r = 0; r + 1 < Rows; r += 2) {
    const __m512 first = _mm512_add_ps(sums[r][0], sums[r + 1][0]), second = _mm512_add_ps(sums[r][1], sums[r + 1][1]);
    finish(weights, epilogue, (row + r) / 2, pair, 0, {first}, {second});
  }
}

}  // namespace

const BlockKernels kAvx512Vnni = {"avx512-vnni", quantize, multiply<6>};

}  // namespace starling

STARLING_TARGET_END
