// NEON with SMMLA: a product of two rows with two outputs, eight inputs of each, in the time of one SDOT. Many rows pay
// for weights in that order; few take SDOT. Sums of a block are whole numbers, the same in both.
#include "product/block_product.h"
#include "simd/instruction_set.h"

STARLING_TARGET_BEGIN("arch=armv8.2-a+dotprod+i8mm")

// clang-format off: the order matters
#include "simd/vector_neon.h"
#include "simd/vector_math.h"
#include "product/projection_core.h"
#include "product/block_product_core.h"
#include "product/block_numbers_neon.h"
#include "product/block_multiply.h"
// clang-format on

namespace starling {
namespace {

constexpr int kMostRows = 6;

// Of a panel. A sum is that of two rows and two outputs until `part`.
struct Matrices {
  static constexpr int bits = 8;
  static constexpr int inputs = 8;
  static constexpr int rows = 2;
  static constexpr bool has_zeros = false;
  struct Factor {
    int8x16_t first, second;  // eight inputs of outputs 0 and 1, and of 2 and 3
  };
  using Eight = int8x16_t;

  static void load(const uint8_t* step, Factor (&factors)[2]) {
    for (int tile = 0; tile < 2; ++tile) {
      const uint8_t* eight = step + tile * kTile * inputs;
      factors[tile] = {load_bytes(eight), load_bytes(eight + 16)};
    }
  }
  static Eight load_two(const QuantizedRows& rows, size_t place, size_t next) {
    return vcombine_s8(vld1_s8(rows.values + place), vld1_s8(rows.values + next));
  }
  static Ints start(int, Ints, Ints) { return all_of(0); }
  static void add(Ints& first, Ints& second, Factor factor, Eight eight) {
    first = vmmlaq_s32(first, eight, factor.first);
    second = vmmlaq_s32(second, eight, factor.second);
  }
  // Two outputs of both rows each, as four outputs of one row each.
  static void part(Ints& first, Ints& second) {
    const int64x2_t a = vreinterpretq_s64_s32(first), b = vreinterpretq_s64_s32(second);
    first = vreinterpretq_s32_s64(vzip1q_s64(a, b));
    second = vreinterpretq_s32_s64(vzip2q_s64(a, b));
  }
  static Ints total(Ints sum, int, Ints, Ints) { return sum; }
};

// Four inputs of four outputs less their zero points.
int8x16_t shifted(int8x16_t nibbles, Ints zeros) {
  return vsubq_s8(nibbles, vreinterpretq_s8_s32(vmulq_s32(zeros, all_of(0x01010101))));
}

// Weights of four outputs of both tiles in one step, as signed bytes.
void load_signed(const PackedWeights& weights, const uint8_t* step, const Ints (&zeros)[2], int8x16_t (&bytes)[2]) {
  if (weights.bits == 8) {
    bytes[0] = load_bytes(step);
    bytes[1] = load_bytes(step + kTile * 4);
    return;
  }
  const uint8x16_t nibbles = vld1q_u8(step);
  bytes[0] = shifted(low_nibbles(nibbles), zeros[0]);
  bytes[1] = shifted(high_nibbles(nibbles), zeros[1]);
}

// [blocks][4][2 tiles][16 outputs][8 inputs]
void unpack(const PackedWeights& weights, int pair, uint8_t* panel) {
  const size_t bytes_of_step = static_cast<size_t>(kPair) * 4 * weights.bits / 8;
  const uint8_t* data = weights.of_pair(pair);
  const uint8_t* zero_points = weights.zeros.data();
  if (zero_points != nullptr) zero_points += static_cast<size_t>(pair) * weights.blocks * kTile;
  for (int block = 0; block < weights.blocks; ++block) {
    for (int lane = 0; lane < kTile; lane += Vector::width) {
      Ints zeros[2] = {all_of(8), all_of(8)};
      if (zero_points != nullptr) load_zero_points(zero_points + block * kTile + lane, zeros);
      for (int eight = 0; eight < kBlock / 8; ++eight) {
        const size_t place = static_cast<size_t>(block) * (kBlock / 8) + eight;
        const uint8_t* step = data + place * 2 * bytes_of_step + lane * 4;
        int8x16_t low[2], high[2];
        load_signed(weights, step, zeros, low);
        load_signed(weights, step + bytes_of_step, zeros, high);
        uint8_t* to = panel + (place * kPair + lane) * 8;
        for (int tile = 0; tile < 2; ++tile, to += kTile * 8) {
          const Ints a = vreinterpretq_s32_s8(low[tile]), b = vreinterpretq_s32_s8(high[tile]);
          vst1q_u8(to, vreinterpretq_u8_s32(vzip1q_s32(a, b)));
          vst1q_u8(to + 16, vreinterpretq_u8_s32(vzip2q_s32(a, b)));
        }
      }
    }
  }
}

void multiply_panel(const PackedWeights& weights, uint8_t* panel, const QuantizedRows& rows, int first, int last,
                    int pair, const Epilogue& epilogue) {
  unpack(weights, pair, panel);
  int row = first;
  for (; last - row >= kMostRows; row += kMostRows) {
    multiply_rows<Matrices, kMostRows>(weights, panel, rows, row, pair, epilogue);
  }
  multiply<kMostRows>(weights, rows, row, last, pair, epilogue);
}

}  // namespace

const BlockKernels kNeonI8mm = {
    "neon-i8mm", 128, {kPair * kBlock, kPair * kBlock}, false, quantize, multiply<kMostRows>, multiply_panel,
};

}  // namespace starling

STARLING_TARGET_END
