// Integers of 128 bits, and formats of weights where SDOT adds four products of signed bytes at once: NEON with and
// without products of matrices share them. Included inside a target region, after block_product_core.h.
#pragma once

namespace starling {
namespace {

using Ints = int32x4_t;

int32_t store_bytes(Vector whole, int8_t* to) {
  const Ints numbers = vcvtq_s32_f32(whole.v);
  const int16x4_t words = vmovn_s32(numbers);
  const int32_t bytes = vget_lane_s32(vreinterpret_s32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
  std::memcpy(to, &bytes, sizeof bytes);
  return vaddvq_s32(numbers);
}

Ints all_of(int32_t number) { return vdupq_n_s32(number); }
int8x16_t load_bytes(const uint8_t* from) { return vreinterpretq_s8_u8(vld1q_u8(from)); }
int8x16_t low_nibbles(uint8x16_t a) { return vreinterpretq_s8_u8(vandq_u8(a, vdupq_n_u8(0x0F))); }
int8x16_t high_nibbles(uint8x16_t a) { return vreinterpretq_s8_u8(vshrq_n_u8(a, 4)); }
Vector to_float(Ints numbers) { return {vcvtq_f32_s32(numbers)}; }
Vector from_half(const uint16_t* from) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from)))}; }

struct Int8 {
  static constexpr int bits = 8;
  static constexpr int inputs = 4;
  static constexpr int rows = 1;
  static constexpr bool has_zeros = false;
  using Factor = int8x16_t;
  using Four = int8x16_t;

  static void load(const uint8_t* step, Factor (&factors)[2]) {
    factors[0] = load_bytes(step);
    factors[1] = load_bytes(step + kTile * 4);
  }
  static Four load_four(const QuantizedRows& rows, size_t place) {
    return vreinterpretq_s8_s32(all_of(load_32(rows.values + place)));
  }
  static Ints start(int, Ints, Ints) { return all_of(0); }
  static Ints add(Ints sum, Factor factor, Four four) { return vdotq_s32(sum, factor, four); }
  static Ints total(Ints sum, int, Ints, Ints) { return sum; }
};

// Of both tiles; a nibble is a signed byte too.
struct Int4 : Int8 {
  static constexpr int bits = 4;

  static void load(const uint8_t* step, Factor (&factors)[2]) {
    const uint8x16_t nibbles = vld1q_u8(step);
    factors[0] = low_nibbles(nibbles);
    factors[1] = high_nibbles(nibbles);
  }
  // A correction is -128 times the sum of the activations: -8 times is 1/16 of it.
  static Ints total(Ints sum, int, Ints, Ints correction) { return vaddq_s32(sum, vshrq_n_s32(correction, 4)); }
};

// Zero points of four outputs of both tiles.
void load_zero_points(const uint8_t* from, Ints (&zeros)[2]) {
  const Ints both_tiles =
      vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_s32(vdup_n_s32(load_32(from)))))));
  zeros[0] = vandq_s32(both_tiles, all_of(0x0F));
  zeros[1] = vshrq_n_s32(both_tiles, 4);
}

struct Int4WithZeros : Int4 {
  static constexpr bool has_zeros = true;

  static void load_zeros(const uint8_t* from, Ints (&zeros)[2]) { load_zero_points(from, zeros); }
  static Ints total(Ints sum, int, Ints zero, Ints correction) {
    return vmlaq_s32(sum, zero, vshrq_n_s32(correction, 7));
  }
};

}  // namespace
}  // namespace starling
