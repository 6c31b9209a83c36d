// Products of float rows with weights that are quantized in blocks of 32: the data, and what an instruction set offers.
//
// weight = (byte - 128) * scale, and a row's activations are rounded to int8 block by block, each block with a scale of
// its own (its greatest magnitude / 127). Products within a block are exact integers; blocks are added in order in
// float32. A second plane rounds what the first has left of an activation, and its products are added: 15 bits in place
// of 8. How many rows there are, and how they are shared out to threads, therefore never changes a bit of a result.
#pragma once

#include <cstddef>
#include <cstdint>

#include "product/projection.h"
#include "simd/memory.h"

namespace starling {

constexpr int kBlock = 32;  // weights that share a scale

// Weights in the order in which they are read: for a pair of tiles and a block, eight steps of four inputs, and in each
// step [2 tiles][16 outputs][4 inputs] bytes.
struct PackedWeights : Projection {
  int blocks = 0;            // of a row
  int planes = 1;            // of the activations that they are multiplied with
  Weights<uint8_t> data;     // [pairs][blocks][8][2][16][4]
  Weights<uint16_t> scales;  // float16 [pairs][blocks][2][16]
};

// Rows of activations, rounded; the planes of one are neighbours. `corrections` is -128 times the sum of a block's
// values: what 128 too much in every byte of the weights adds to a product.
struct QuantizedRows {
  int8_t* values;        // [rows][planes][blocks * 32]
  float* scales;         // [rows][planes][blocks]
  int32_t* corrections;  // [rows][planes][blocks]
  int blocks;
  int planes;
};

// The functions of one instruction set.
struct BlockKernels {
  const char* name;
  // Round `row` [inputs], normed before, as row `index` of `out`.
  void (*quantize)(const float* row, int inputs, const Norm& norm, const QuantizedRows& out, int index);
  // Results of rows [first, last) in the columns of one pair.
  void (*multiply)(const PackedWeights& weights, const QuantizedRows& rows, int first, int last, int pair,
                   const Epilogue& epilogue);
};

extern const BlockKernels kAvx512Vnni;
extern const BlockKernels kAvx2;

// The best this processor can run; nullptr where it can run none.
const BlockKernels* block_kernels();

}  // namespace starling
