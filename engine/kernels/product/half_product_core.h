// Products of float32 rows with weights of 16 bits, widened when they are read: one by one for few rows, a panel at a
// time for many. Included inside a target region, after projection_core.h and halves_*.h.
//
// A sum is a chain of multiply-adds over the inputs, from the first to the last, in either case.
#pragma once

namespace starling {
namespace {

constexpr int kVectors = kPair / Vector::width;  // of a pair's outputs
constexpr int kFewRows = Vector::width == 16 ? 6 : 2;
constexpr int kPanelRows = Vector::registers * 3 / 4 / kVectors;  // as many as registers hold the sums of

// out [blocks * 32] = row [inputs], normed; zeros follow.
inline void prepare_floats(const float* row, int inputs, const Norm& norm, const PreparedRows& out, int index) {
  const bool normed = norm.weight != nullptr;
  const Vector factor = Vector::all(normed ? inverse_root_mean_square(row, inputs, norm.epsilon) : 1.0f);
  float* to = reinterpret_cast<float*>(out.values) + static_cast<size_t>(index) * out.blocks * kHalfBlock;
  for (int i = 0; i < out.blocks * kHalfBlock; i += Vector::width) {
    const Vector::Mask mask = Vector::first(inputs - i);
    Vector x = Vector::load(row + i, mask);
    if (normed) x = x * factor * Vector::load(norm.weight + i, mask);
    x.store(to + i);
  }
}

template <int Rows>
inline void finish_rows(const HalfWeights& weights, const Epilogue& epilogue, int row, int pair,
                        Vector (&sums)[Rows][kVectors]) {
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors / 2; ++v) {
      finish(weights, epilogue, row + r, pair, v * Vector::width, sums[r][v], sums[r][kVectors / 2 + v]);
    }
  }
}

// Weights read and widened where they are.
template <typename Type>
struct Packed {
  const HalfWeights& weights;
  int pair;

  template <int Rows>
  void multiply(const float* x, size_t stride, Vector (&sums)[Rows][kVectors]) const {
    const uint16_t* data = weights.block(pair, 0);
    for (int block = 0; block < weights.blocks; ++block) {
      for (int two = 0; two < kHalfBlock; two += 2) {
        Vector even[kVectors], odd[kVectors];
        Type::load_inputs(data + two * kTile, even, odd);
        Type::load_inputs(data + kHalfTileSize + two * kTile, even + kVectors / 2, odd + kVectors / 2);
        for (int r = 0; r < Rows; ++r) {
          const Vector first = Vector::all(x[r * stride + two]), second = Vector::all(x[r * stride + two + 1]);
          for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(first, even[v], sums[r][v]);
          for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(second, odd[v], sums[r][v]);
        }
      }
      data += 2 * kHalfTileSize;
      x += kHalfBlock;
    }
  }
};

// Weights of a pair, widened before: [inputs][32].
struct Panel {
  const float* floats;
  int inputs;

  template <int Rows>
  void multiply(const float* x, size_t stride, Vector (&sums)[Rows][kVectors]) const {
    for (int input = 0; input < inputs; ++input) {
      Vector w[kVectors];
      for (int v = 0; v < kVectors; ++v) w[v] = Vector::load(floats + input * kPair + v * Vector::width);
#pragma GCC unroll 12
      for (int r = 0; r < Rows; ++r) {
        const Vector value = Vector::all(x[r * stride + input]);
        for (int v = 0; v < kVectors; ++v) sums[r][v] = fma(value, w[v], sums[r][v]);
      }
    }
  }
};

template <typename Type>
inline Panel widen(const HalfWeights& weights, int pair) {
  thread_local Array<float> memory;
  float* floats = grow(memory, static_cast<size_t>(weights.blocks) * kHalfBlock * kPair);
  const uint16_t* data = weights.block(pair, 0);
  for (int line = 0; line < weights.blocks * kHalfBlock / 2; ++line) {
    const int block = line / (kHalfBlock / 2), two = line % (kHalfBlock / 2) * 2;
    for (int tile = 0; tile < 2; ++tile) {
      Vector even[kVectors / 2], odd[kVectors / 2];
      Type::load_inputs(data + (block * 2 + tile) * kHalfTileSize + two * kTile, even, odd);
      float* to = floats + static_cast<size_t>(line) * 2 * kPair + tile * kTile;
      for (int v = 0; v < kVectors / 2; ++v) {
        even[v].store(to + v * Vector::width);
        odd[v].store(to + kPair + v * Vector::width);
      }
    }
  }
  return {floats, weights.blocks * kHalfBlock};
}

template <int Rows, typename Source>
inline void multiply_some(const Source& source, const HalfWeights& weights, const PreparedRows& rows, int row, int pair,
                          const Epilogue& epilogue) {
  const size_t stride = static_cast<size_t>(rows.blocks) * kHalfBlock;
  Vector sums[Rows][kVectors];
  for (int r = 0; r < Rows; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector::zero();
  }
  source.template multiply<Rows>(reinterpret_cast<const float*>(rows.values) + row * stride, stride, sums);
  finish_rows<Rows>(weights, epilogue, row, pair, sums);
}

template <int Rows, typename Source>
inline void multiply_rest(int left, const Source& source, const HalfWeights& weights, const PreparedRows& rows, int row,
                          int pair, const Epilogue& epilogue) {
  if constexpr (Rows > 0) {
    if (left == Rows) return multiply_some<Rows>(source, weights, rows, row, pair, epilogue);
    multiply_rest<Rows - 1>(left, source, weights, rows, row, pair, epilogue);
  }
}

template <typename Type>
inline void multiply(const HalfWeights& weights, const PreparedRows& rows, int first, int last, int pair,
                     const Epilogue& epilogue) {
  if (last - first <= kFewRows) {
    return multiply_rest<kFewRows>(last - first, Packed<Type>{weights, pair}, weights, rows, first, pair, epilogue);
  }
  const Panel panel = widen<Type>(weights, pair);
  int row = first;
  for (; last - row >= kPanelRows; row += kPanelRows) {
    multiply_some<kPanelRows>(panel, weights, rows, row, pair, epilogue);
  }
  multiply_rest<kPanelRows - 1>(last - row, panel, weights, rows, row, pair, epilogue);
}

}  // namespace
}  // namespace starling
