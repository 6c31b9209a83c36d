// What stands before the products: rounding the activations. Included inside a target region, after projection_core.h;
// the file that includes it defines store_bytes.
#pragma once

namespace starling {
namespace {

constexpr int kBlockVectors = kBlock / Vector::width;
constexpr float kLeastMagnitude = 1e-36f;  // 127 / less would be infinite; a block of less is zero

// Store whole numbers as Vector::width bytes, and return their sum.
int32_t store_bytes(Vector whole, int8_t* to);

inline int32_t load_32(const void* from) {
  int32_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

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

}  // namespace
}  // namespace starling
