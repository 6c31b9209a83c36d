// Products of float rows with weights of 16 bits, float16 or bfloat16: the data, and what an instruction set offers.
//
// Every sum of a product is taken over the inputs in one order, whichever rows and outputs are computed beside it, so
// that neither batches nor threads nor the cut of a prompt change a bit of a result.
#pragma once

#include <cstddef>
#include <cstdint>

#include "product/projection.h"
#include "simd/memory.h"

namespace starling {

constexpr int kHalfBlock = 32;    // inputs whose weights lie together
constexpr int kRowsTogether = 8;  // rows of activations that may be stored as one piece
constexpr int kHalfTileSize = kTile * kHalfBlock;

// Weights in the order in which they are read: [pairs][blocks][2 tiles] pieces of 32 inputs and 16 outputs each, of
// float16 [32 inputs][16 outputs], of bfloat16 [16 pairs of inputs][16 outputs][2 inputs]. What does not exist is zero.
struct HalfWeights : Projection {
  int blocks = 0;
  Weights<uint16_t> data;

  const uint16_t* block(int pair, int index) const {
    return data.data() + (static_cast<size_t>(pair) * blocks + index) * 2 * kHalfTileSize;
  }
};

// Rows of activations in the form in which a HalfKernels multiplies them: 128 bytes of a row for each block, those of
// kRowsTogether rows in whichever order it likes.
struct PreparedRows {
  uint8_t* values;
  int blocks;

  static size_t bytes(size_t rows, int blocks) {
    return (rows + kRowsTogether - 1) / kRowsTogether * kRowsTogether * blocks * kHalfBlock * sizeof(float);
  }
};

// The functions of one instruction set, for weights of one type.
struct HalfKernels {
  const char* name;
  // Make `row` [inputs], normed before, ready as row `index` of `out`.
  void (*prepare)(const float* row, int inputs, const Norm& norm, const PreparedRows& out, int index);
  // Results of rows [first, last) in the columns of one pair; `first` is a multiple of kRowsTogether.
  void (*multiply)(const HalfWeights& weights, const PreparedRows& rows, int first, int last, int pair,
                   const Epilogue& epilogue);
};

extern const HalfKernels kHalfAmx;  // bfloat16
extern const HalfKernels kFloat16Avx512, kBFloat16Avx512;
extern const HalfKernels kFloat16Avx2, kBFloat16Avx2;
extern const HalfKernels kFloat16Neon, kBFloat16Neon;

// The best this processor can run; nullptr where it can run none.
const HalfKernels* half_kernels(bool is_bfloat16);

}  // namespace starling
