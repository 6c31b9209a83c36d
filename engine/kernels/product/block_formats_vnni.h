// Formats of weights where vpdpbusd adds four products of bytes at once: a sum begins with what the zero point takes
// from it. Included inside a target region, before block_multiply.h; the file that includes it defines Ints, all_of,
// load_ints, store_ints, load_numbers, low_nibbles, high_nibbles, both, shifted_down, add_products and
// add_products_of_words.
#pragma once

namespace starling {
namespace {

struct Int8 {
  static constexpr int bits = 8;
  static constexpr int inputs = 4;
  static constexpr int rows = 1;
  static constexpr bool has_zeros = false;
  using Factor = Ints;
  using Four = Ints;

  static void load(const uint8_t* step, Factor (&factors)[2]) {
    factors[0] = load_ints(step);
    factors[1] = load_ints(step + kTile * 4);
  }
  static Four load_four(const QuantizedRows& rows, size_t place) { return all_of(load_32(rows.values + place)); }
  static Ints start(int, Ints, Ints correction) { return correction; }
  static Ints add(Ints sum, Factor factor, Four four) { return add_products(sum, factor, four); }
  static Ints total(Ints sum, int, Ints, Ints) { return sum; }
};

// The second tile's numbers stay in the high nibbles: its sums are 16 times as great until they are whole.
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
    factors[1] = both(nibbles, all_of(static_cast<int32_t>(0xF0F0F0F0)));
  }
  static Four load_four(const QuantizedRows& rows, size_t place) { return Int8::load_four(rows, place); }
  // A correction is -128 times the sum of the activations: -8 times is 1/16 of it.
  static Ints start(int tile, Ints, Ints correction) { return tile == 0 ? shifted_down<4>(correction) : correction; }
  static Ints add(Ints sum, Factor factor, Four four) { return add_products(sum, factor, four); }
  static Ints total(Ints sum, int tile, Ints, Ints) { return tile == 0 ? sum : shifted_down<4>(sum); }
};

struct Int4WithZeros : Int4 {
  static constexpr bool has_zeros = true;

  static void load_zeros(const uint8_t* from, Ints (&zeros)[2]) {
    const Ints numbers = load_numbers(from);
    zeros[0] = both(numbers, all_of(0x0F));
    zeros[1] = both(numbers, all_of(0xF0));
  }
  // Of a block the sum of its activations, at most 32 * 127, is a word; a zero point's high word is zero.
  static Ints start(int, Ints zero, Ints correction) {
    return add_products_of_words(all_of(0), zero, shifted_down<7>(correction));
  }
};

// Nibbles that were unpacked to bytes in the order of Int8.
struct UnpackedInt4 : Int8 {
  static Ints start(int, Ints zero, Ints correction) { return Int4::start(0, zero, correction); }
};

struct UnpackedInt4WithZeros : Int8 {
  static constexpr bool has_zeros = true;

  static void load_zeros(const uint8_t* from, Ints (&zeros)[2]) {
    Int4WithZeros::load_zeros(from, zeros);
    zeros[1] = shifted_down<4>(zeros[1]);
  }
  static Ints start(int tile, Ints zero, Ints correction) { return Int4WithZeros::start(tile, zero, correction); }
};

// Bytes of a pair's weights, in the order of Int8.
inline void unpack(const uint8_t* nibbles, size_t blocks, uint8_t* bytes) {
  constexpr size_t kBytes = Vector::width * 4;  // of a vector
  for (size_t step = 0; step < blocks * (kBlock / 4); ++step) {
    for (size_t at = 0; at < kTile * 4; at += kBytes) {
      const Ints both_tiles = load_ints(nibbles + step * kTile * 4 + at);
      store_ints(low_nibbles(both_tiles), bytes + step * kPair * 4 + at);
      store_ints(high_nibbles(both_tiles), bytes + step * kPair * 4 + kTile * 4 + at);
    }
  }
}

}  // namespace
}  // namespace starling
