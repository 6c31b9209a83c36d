// The norm in front of a product, and what happens to its sums. Included inside a target region, after vector_math.h.
#pragma once

namespace starling {
namespace {

inline float inverse_root_mean_square(const float* row, int inputs, float epsilon) {
  Vector sum = Vector::zero();
  for (int i = 0; i < inputs; i += Vector::width) {
    const Vector x = Vector::load(row + i, Vector::first(inputs - i));
    sum = fma(x, x, sum);
  }
  return 1.0f / std::sqrt(sum.sum() / static_cast<float>(inputs) + epsilon);
}

inline Vector with_bias(const Epilogue& epilogue, int output, int outputs, Vector sum) {
  if (epilogue.bias == nullptr) return sum;
  return sum + Vector::load(epilogue.bias + output, Vector::first(outputs - output));
}

// Add the residual and store the columns from `column` on, as far as they exist.
inline void store(const Epilogue& epilogue, int row, int width, int column, Vector sum) {
  const Vector::Mask mask = Vector::first(width - column);
  const size_t place = static_cast<size_t>(row) * width + column;
  if (epilogue.residual != nullptr) sum = sum + Vector::load(epilogue.residual + place, mask);
  sum.store(epilogue.result + place, mask);
}

// `first` and `second`: sums of the pair's two tiles, of the outputs from `lane` on.
inline void finish(const Projection& weights, const Epilogue& epilogue, int row, int pair, int lane, Vector first,
                   Vector second) {
  const int width = weights.width();
  if (weights.gated) {
    const int column = pair * kTile + lane;
    const Vector gate = with_bias(epilogue, column, width, first);
    const Vector value = with_bias(epilogue, width + column, weights.outputs, second);
    store(epilogue, row, width, column, silu(gate) * value);
    return;
  }
  const int column = pair * kPair + lane;
  store(epilogue, row, width, column, with_bias(epilogue, column, width, first));
  store(epilogue, row, width, column + kTile, with_bias(epilogue, column + kTile, width, second));
}

}  // namespace
}  // namespace starling
