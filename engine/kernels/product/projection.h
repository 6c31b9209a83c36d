// What every product of a projection has in common, whatever its weights: the order of the outputs, the norm in front,
// and what happens to the sums.
#pragma once

#include <algorithm>

namespace starling {

constexpr int kTile = 16;  // outputs that are computed side by side
constexpr int kPair = 32;  // outputs of two neighbouring tiles, the unit of work

// Outputs are computed in pairs of tiles. Of gated weights one tile is the gate's, the other the value's.
struct Projection {
  int inputs = 0;
  int outputs = 0;  // rows of the weight matrix
  int pairs = 0;
  bool gated = false;

  // Columns of the product's result.
  int width() const { return gated ? outputs / 2 : outputs; }
  // The row of the weight matrix that `lane` of `tile` (0 or 1) of a pair computes; outputs where there is none.
  int row_of(int pair, int tile, int lane) const {
    if (!gated) return std::min(pair * kPair + tile * kTile + lane, outputs);
    const int half = outputs / 2, column = pair * kTile + lane;
    return column < half ? tile * half + column : outputs;
  }
};

// An RMSNorm in front of a product: row / sqrt(mean(row²) + epsilon) * weight [inputs].
struct Norm {
  const float* weight = nullptr;  // nullptr: there is none
  float epsilon = 0;
};

// What happens to the sums before they are stored, in this order: + bias [outputs], silu(gate) * value where the
// weights are gated, + residual [rows][width].
struct Epilogue {
  const float* bias = nullptr;
  const float* residual = nullptr;
  float* result = nullptr;  // [rows][width]
};

}  // namespace starling
