// What stands before the products of rounded activations: rounding them, and sharing out the rows. Included inside a
// target region, after projection_core.h; the file that includes it defines store_bytes and multiply_rows.
#pragma once

namespace starling {
namespace {

constexpr int kBlockVectors = kBlock / Vector::width;
constexpr float kLeastMagnitude = 1e-36f;  // 127 / less would be infinite; a block of less is zero

// Store whole numbers as Vector::width bytes, and return their sum.
int32_t store_bytes(Vector whole, int8_t* to);

inline void quantize(const float* row, int inputs, const Norm& norm, const QuantizedRows& out, int index) {
  const bool normed = norm.weight != nullptr;
  const Vector factor = Vector::all(normed ? inverse_root_mean_square(row, inputs, norm.epsilon) : 1.0f);
  for (int block = 0; block < out.blocks; ++block) {
    Vector x[kBlockVectors], greatest = Vector::zero();
    for (int i = 0; i < kBlockVectors; ++i) {
      const int at = block * kBlock + i * Vector::width;
      const Vector::Mask mask = Vector::first(inputs - at);
      x[i] = Vector::load(row + at, mask);
      if (normed) x[i] = x[i] * factor * Vector::load(norm.weight + at, mask);
      greatest = max_magnitude(greatest, x[i]);
    }
    for (int plane = 0; plane < out.planes; ++plane) {
      const size_t at = (static_cast<size_t>(index) * out.planes + plane) * out.blocks + block;
      const float most = greatest.greatest_magnitude();
      const bool is_finite = most <= std::numeric_limits<float>::max();
      // A value that is not finite makes the whole row none, as in float32 it would.
      const float scale = is_finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
      const Vector inverse = Vector::all(most > kLeastMagnitude && is_finite ? 127.0f / most : 0.0f);
      int32_t sum = 0;
      greatest = Vector::zero();
      for (int i = 0; i < kBlockVectors; ++i) {
        const Vector whole = is_finite ? rounded(x[i] * inverse) : Vector::zero();
        sum += store_bytes(whole, out.values + at * kBlock + i * Vector::width);
        x[i] = fnma(whole, Vector::all(scale), x[i]);
        greatest = max_magnitude(greatest, x[i]);
      }
      out.scales[at] = scale;
      out.corrections[at] = -128 * sum;
    }
  }
}

template <int Rows>
void multiply_rows(const PackedWeights& weights, const QuantizedRows& rows, int row, int pair,
                   const Epilogue& epilogue);

// kMostRows at a time, then what is left.
template <int Rows>
inline void multiply_rest(int left, const PackedWeights& weights, const QuantizedRows& rows, int row, int pair,
                          const Epilogue& epilogue) {
  if constexpr (Rows > 0) {
    if (left == Rows) return multiply_rows<Rows>(weights, rows, row, pair, epilogue);
    multiply_rest<Rows - 1>(left, weights, rows, row, pair, epilogue);
  }
}

template <int MostRows>
inline void multiply(const PackedWeights& weights, const QuantizedRows& rows, int first, int last, int pair,
                     const Epilogue& epilogue) {
  int row = first;
  for (; last - row >= MostRows; row += MostRows) multiply_rows<MostRows>(weights, rows, row, pair, epilogue);
  multiply_rest<MostRows - 1>(last - row, weights, rows, row, pair, epilogue);
}

// Four neighbouring activations of a row.
inline int32_t load_four(const int8_t* values) {
  int32_t four;
  std::memcpy(&four, values, sizeof four);
  return four;
}

}  // namespace
}  // namespace starling
