// AVX2: vpmaddubsw multiplies 32 unsigned by signed bytes and adds neighbours in 16 bits, where they must fit.
#include "product/block_product.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("avx2,fma,f16c")

// clang-format off: the order matters
#include "simd/vector_avx2.h"
#include "simd/vector_math.h"
#include "product/projection_core.h"
#include "product/block_product_core.h"
#include "product/block_numbers_256.h"
// clang-format on

namespace starling {
namespace {

// A sum that is added to in this order: any other needs more registers than there are, and compilers would take it.
Ints in_order(Ints sum) {
  asm("" : "+x"(sum));
  return sum;
}

Ints add_neighbours(Ints words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }

// |weight| times the activation with the weight's sign: two products are at most 2 * 128 * 127 = 32512.
struct Int8 {
  static constexpr int bits = 8;
  static constexpr int inputs = 4;
  static constexpr int rows = 1;
  static constexpr bool has_zeros = false;
  using Four = Ints;
  struct Factor {
    Ints weight, magnitude;
  };

  static void load(const uint8_t* step, Factor (&factors)[2]) {
    for (int tile = 0; tile < 2; ++tile) {
      const Ints weight = load_ints(step + tile * kTile * 4);
      factors[tile] = {weight, _mm256_abs_epi8(weight)};
    }
  }
  static Four load_four(const QuantizedRows& rows, size_t place) { return all_of(load_32(rows.values + place)); }
  static Ints start(int, Ints, Ints) { return _mm256_setzero_si256(); }
  static Ints add(Ints sum, Factor factor, Four four) {
    const Ints words = _mm256_maddubs_epi16(factor.magnitude, _mm256_sign_epi8(four, factor.weight));
    return in_order(_mm256_add_epi32(sum, add_neighbours(words)));
  }
  static Ints total(Ints sum, int, Ints, Ints) { return sum; }
};

// A block's eight sums of two products are at most 8 * 2 * 15 * 127 = 30480: they are added in 16 bits.
struct Int4 {
  static constexpr int bits = 4;
  static constexpr int inputs = 4;
  static constexpr int rows = 1;
  static constexpr bool has_zeros = false;
  using Factor = Ints;
  using Four = Ints;

  static void load(const uint8_t* step, Factor (&factors)[2]) {
    const Ints nibbles = load_ints(step);
    factors[0] = low_nibbles(nibbles);
    factors[1] = high_nibbles(nibbles);
  }
  static Four load_four(const QuantizedRows& rows, size_t place) { return Int8::load_four(rows, place); }
  static Ints start(int, Ints, Ints) { return _mm256_setzero_si256(); }
  static Ints add(Ints sum, Factor factor, Four four) {
    return in_order(_mm256_add_epi16(sum, _mm256_maddubs_epi16(factor, four)));
  }
  // A correction is -128 times the sum of the activations: -8 times is 1/16 of it.
  static Ints total(Ints sum, int, Ints, Ints correction) {
    return _mm256_add_epi32(add_neighbours(sum), shifted_down<4>(correction));
  }
};

struct Int4WithZeros : Int4 {
  static constexpr bool has_zeros = true;

  static void load_zeros(const uint8_t* from, Ints (&zeros)[2]) {
    const Ints numbers = load_numbers(from);
    zeros[0] = both(numbers, all_of(0x0F));
    zeros[1] = _mm256_srli_epi32(numbers, 4);
  }
  // Of a block the sum of its activations, at most 32 * 127, is a word; a zero point's high word is zero.
  static Ints total(Ints sum, int, Ints zero, Ints correction) {
    return _mm256_add_epi32(add_neighbours(sum), _mm256_madd_epi16(zero, shifted_down<7>(correction)));
  }
};

// Many rows pay for weights widened to words: two products less that only the multiplier can do.
struct Words {
  static constexpr int bits = 16;
  static constexpr int inputs = 4;
  static constexpr int rows = 1;
  static constexpr bool has_zeros = false;
  struct Four {
    Ints even, odd;
  };
  using Factor = Four;  // inputs 0 and 2, and 1 and 3, of eight outputs

  static void load(const uint8_t* step, Factor (&factors)[2]) {
    for (int tile = 0; tile < 2; ++tile) {
      const uint8_t* words = step + tile * kTile * 8;
      factors[tile] = {load_ints(words), load_ints(words + sizeof(Ints))};
    }
  }
  static Four load_four(const QuantizedRows& rows, size_t place) {
    return {all_of(load_32(rows.words + place)), all_of(load_32(rows.words + place + 2))};
  }
  static Ints start(int, Ints, Ints) { return _mm256_setzero_si256(); }
  static Ints add(Ints sum, Factor factor, Four four) {
    sum = in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(factor.even, four.even)));
    return in_order(_mm256_add_epi32(sum, _mm256_madd_epi16(factor.odd, four.odd)));
  }
  static Ints total(Ints sum, int, Ints, Ints) { return sum; }
};

// [blocks][8][4] of eight outputs' inputs 0 and 2, and their inputs 1 and 3.
void unpack(const uint8_t* bytes, size_t blocks, uint8_t* words) {
  for (size_t at = 0; at < blocks * kPair * kBlock; at += sizeof(Ints)) {
    const Ints four = load_ints(bytes + at);
    store_ints(_mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), words + at * 2);
    store_ints(_mm256_srai_epi16(four, 8), words + at * 2 + sizeof(Ints));
  }
}

// Words of a row or plane, in the order that the format has.
void widen(const QuantizedRows& rows, int row) {
  const size_t size = static_cast<size_t>(rows.blocks) * kBlock, start = row * size;
  for (size_t at = start; at < start + size; at += 16) {
    const Ints words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rows.values + at)));
    const Ints ordered = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(words, 0xD8), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows.words + at), ordered);
  }
}

void quantize_with_words(const float* row, int inputs, const Norm& norm, const QuantizedRows& out, int index) {
  quantize(row, inputs, norm, out, index);
  if (out.words == nullptr) return;
  for (int plane = 0; plane < out.planes; ++plane) widen(out, index * out.planes + plane);
}

}  // namespace
}  // namespace starling

#include "product/block_multiply.h"

namespace starling {
namespace {

void multiply_panel(const PackedWeights& weights, uint8_t* panel, const QuantizedRows& rows, int first, int last,
                    int pair, const Epilogue& epilogue) {
  unpack(weights.of_pair(pair), weights.blocks, panel);
  multiply_format<Words, 4>(weights, panel, rows, first, last, pair, epilogue);
}

}  // namespace

const BlockKernels kAvx2 = {"avx2",      128,           {kPair * kBlock * 2, 0}, true, quantize_with_words,
                            multiply<4>, multiply_panel};

}  // namespace starling

STARLING_TARGET_END
