// The products between: sums of blocks, in one order on every instruction set. Included inside a target region, after
// block_product_core.h and what the instruction set defines:
//   Ints, Vector::width int32; to_float(Ints) and from_half(const uint16_t*), Vectors of so many numbers;
//   formats of weights, Int8, Int4 and Int4WithZeros, each with
//     bits; has_zeros; inputs, of a step; Factor, the weights of one tile in a step;
//     load(const uint8_t* step, Factor (&)[2]), those of both tiles;
//     Four and load_four(const QuantizedRows&, place), four neighbouring activations of a row in every lane;
//     load_zeros(const uint8_t*, Ints (&)[2]), where it has zero points;
//     start(tile, Ints zero, Ints correction), add(Ints sum, Factor, Four) and total(sum, tile, zero, correction):
//       a sum of products with four activations at a time, from its beginning to its whole;
//     rows, 1; or 2, where products are of matrices: then it has Eight and load_two(const QuantizedRows&, place, next),
//       eight neighbouring activations of each of two rows, add(Ints& sum, Ints& next, Factor, Eight), and part(Ints&
//       sum, Ints& next), which gives each row what is its own.
#pragma once

namespace starling {
namespace {

constexpr int kHalves = kTile / Vector::width;  // vectors of a tile's outputs

// Sums of `Rows` rows (or planes of rows) from `row` in a pair's tiles, for `Halves` vectors of each tile from `half`.
// `data`: the pair's weights, as the format has them.
template <class Format, int Rows, int Halves>
inline void sum_blocks(const PackedWeights& weights, const uint8_t* data, const QuantizedRows& rows, int row, int pair,
                       int half, Vector (&sums)[Rows][Halves][2]) {
  constexpr size_t kBytes = kPair * kBlock * Format::bits / 8, kStep = kBytes / (kBlock / Format::inputs);
  constexpr size_t kHalfBytes = Vector::width * Format::inputs * (Format::bits == 4 ? 8 : Format::bits) / 8;
  const size_t blocks = weights.blocks, start = static_cast<size_t>(pair) * blocks, lane = half * Vector::width;
  data += half * kHalfBytes;
  const uint16_t* scales = weights.scales.data() + start * kPair + lane;
  const uint8_t* zeros = Format::has_zeros ? weights.zeros.data() + start * kTile + lane : nullptr;
  for (int r = 0; r < Rows; ++r) {
    for (int h = 0; h < Halves; ++h) sums[r][h][0] = sums[r][h][1] = Vector::zero();
  }
  for (size_t block = 0; block < blocks; ++block) {
    const size_t at = row * blocks + block;
    Ints dots[Rows][Halves][2], zero[Halves][2]{};
    for (int h = 0; h < Halves; ++h) {
      if constexpr (Format::has_zeros) Format::load_zeros(zeros + h * Vector::width, zero[h]);
      for (int r = 0; r < Rows; ++r) {
        const Ints correction = all_of(rows.corrections[at + r * blocks]);
        for (int tile = 0; tile < 2; ++tile) dots[r][h][tile] = Format::start(tile, zero[h][tile], correction);
      }
    }
#pragma GCC unroll 8
    for (int step = 0; step < kBlock / Format::inputs; ++step) {
#pragma GCC unroll 2
      for (int h = 0; h < Halves; ++h) {
        typename Format::Factor factors[2];
        Format::load(data + step * kStep + h * kHalfBytes, factors);
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r += Format::rows) {
          const size_t place = (at + r * blocks) * kBlock + step * Format::inputs;
          if constexpr (Format::rows == 2) {
            const typename Format::Eight x = Format::load_two(rows, place, place + blocks * kBlock);
            for (int tile = 0; tile < 2; ++tile) Format::add(dots[r][h][tile], dots[r + 1][h][tile], factors[tile], x);
          } else {
            const typename Format::Four x = Format::load_four(rows, place);
            dots[r][h][0] = Format::add(dots[r][h][0], factors[0], x);
            dots[r][h][1] = Format::add(dots[r][h][1], factors[1], x);
          }
        }
      }
    }
    if constexpr (Format::rows == 2) {
      for (int r = 0; r < Rows; r += 2) {
        for (int h = 0; h < Halves; ++h) {
          for (int tile = 0; tile < 2; ++tile) Format::part(dots[r][h][tile], dots[r + 1][h][tile]);
        }
      }
    }
    for (int h = 0; h < Halves; ++h) {
      for (int tile = 0; tile < 2; ++tile) {
        const Vector scale = from_half(scales + tile * kTile + h * Vector::width);
        for (int r = 0; r < Rows; ++r) {
          const Ints correction = all_of(rows.corrections[at + r * blocks]);
          const Vector dot = to_float(Format::total(dots[r][h][tile], tile, zero[h][tile], correction));
          sums[r][h][tile] = fma(dot, scale * Vector::all(rows.scales[at + r * blocks]), sums[r][h][tile]);
        }
      }
    }
    data += kBytes;
    scales += kPair;
    if (Format::has_zeros) zeros += kTile;
  }
}

template <class Format, int Rows>
inline void multiply_rows(const PackedWeights& weights, const uint8_t* data, const QuantizedRows& rows, int row,
                          int pair, const Epilogue& epilogue) {
  static_assert(Rows % Format::rows == 0);
  // Of few rows all outputs at once: weights are then read once, as they lie.
  constexpr int kAtOnce = Rows <= 2 ? kHalves : std::max(kHalves / 2, 1);
  for (int half = 0; half < kHalves; half += kAtOnce) {
    Vector sums[Rows][kAtOnce][2];
    sum_blocks<Format, Rows, kAtOnce>(weights, data, rows, row, pair, half, sums);
    for (int h = 0; h < kAtOnce; ++h) {
      const int lane = (half + h) * Vector::width;
      if (weights.planes == 1) {
        for (int r = 0; r < Rows; ++r) finish(weights, epilogue, row + r, pair, lane, sums[r][h][0], sums[r][h][1]);
      } else {
        for (int r = 0; r + 1 < Rows; r += 2) {
          finish(weights, epilogue, (row + r) / 2, pair, lane, sums[r][h][0] + sums[r + 1][h][0],
                 sums[r][h][1] + sums[r + 1][h][1]);
        }
      }
    }
  }
}

// What is left of the rows, fewer than Rows + 1.
template <class Format, int Rows>
inline void multiply_rest(int left, const PackedWeights& weights, const uint8_t* data, const QuantizedRows& rows,
                          int row, int pair, const Epilogue& epilogue) {
  if constexpr (Rows > 0) {
    if (left == Rows) return multiply_rows<Format, Rows>(weights, data, rows, row, pair, epilogue);
    multiply_rest<Format, Rows - 1>(left, weights, data, rows, row, pair, epilogue);
  }
}

// MostRows, an even number, at a time, then what is left.
template <class Format, int MostRows>
inline void multiply_format(const PackedWeights& weights, const uint8_t* data, const QuantizedRows& rows, int first,
                            int last, int pair, const Epilogue& epilogue) {
  static_assert(MostRows % 2 == 0, "planes of a row are multiplied together");
  int row = first;
  for (; last - row >= MostRows; row += MostRows) {
    multiply_rows<Format, MostRows>(weights, data, rows, row, pair, epilogue);
  }
  multiply_rest<Format, MostRows - 1>(last - row, weights, data, rows, row, pair, epilogue);
}

template <int MostRows>
inline void multiply(const PackedWeights& weights, const QuantizedRows& rows, int first, int last, int pair,
                     const Epilogue& epilogue) {
  const uint8_t* data = weights.of_pair(pair);
  if (weights.bits == 8) return multiply_format<Int8, MostRows>(weights, data, rows, first, last, pair, epilogue);
  if (weights.zeros.data() == nullptr) {
    return multiply_format<Int4, MostRows>(weights, data, rows, first, last, pair, epilogue);
  }
  multiply_format<Int4WithZeros, MostRows>(weights, data, rows, first, last, pair, epilogue);
}

}  // namespace
}  // namespace starling
