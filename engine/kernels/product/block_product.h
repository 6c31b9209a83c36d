// Products of float rows with weights that are quantized in blocks of 32: the data, and what an instruction set offers.
//
// weight = (number - zero point) * scale, where a number has 8 bits or 4; the zero point is the middle (128 or 8), or
// of 4 bits each block's own. A row's activations are rounded to int8 block by block, each block with a scale of its
// own (its greatest magnitude / 127). Products within a block are exact integers; blocks are added in order in float32.
// A second plane rounds what the first has left of an activation, and its products are added: 15 bits in place of 8.
// How many rows there are, how they are shared out to threads, and which instruction set multiplies, therefore never
// changes a bit of a product.
#pragma once

#include <cstddef>
#include <cstdint>

#include "product/projection.h"
#include "simd/memory.h"

namespace starling {

constexpr int kBlock = 32;  // weights that share a scale

// Weights in the order in which they are read: for a pair of tiles and a block, eight steps of four inputs, and in each
// step [2 tiles][16 outputs][4 inputs] bytes, or [16 outputs][4 inputs] whose low nibbles are the first tile's and
// whose high ones are the second's.
struct PackedWeights : Projection {
  int bits = 8;
  int blocks = 0;            // of a row
  int planes = 1;            // of the activations that they are multiplied with
  Weights<uint8_t> data;     // [pairs][blocks][8][2][16][4], of 4 bits [pairs][blocks][8][16][4]
  Weights<uint16_t> scales;  // float16 [pairs][blocks][2][16]
  Weights<uint8_t> zeros;    // [pairs][blocks][16], nibbles as in the data; none where every zero point is the middle

  // The data of a pair.
  uint8_t* of_pair(int pair) const {
    return data.data() + static_cast<size_t>(pair) * blocks * (kPair * kBlock / 8) * bits;
  }
};

// Rows of activations, rounded; the planes of one are neighbours. `corrections` is -128 times the sum of a block's
// values: what 128 too much in every byte of the weights adds to a product.
struct QuantizedRows {
  int8_t* values;        // [rows][planes][blocks * 32]
  int16_t* words;        // the same for a panel, where one is wanted: of every four values 0, 2, 1 and 3
  float* scales;         // [rows][planes][blocks]
  int32_t* corrections;  // [rows][planes][blocks]
  int blocks;
  int planes;
};

// The functions of one instruction set.
struct BlockKernels {
  const char* name;
  uint8_t flipped;  // bits of a weight of 8 that are stored the other way round: 128 stores signed bytes
  // Bytes of a block of a pair in a panel, which is what many rows are multiplied with, of weights of 8 bits and of 4;
  // 0: with the weights as they are stored.
  size_t panel_bytes[2];
  bool panel_takes_words;
  // Round `row` [inputs], normed before, as row `index` of `out`, with its words where `out` has any.
  void (*quantize)(const float* row, int inputs, const Norm& norm, const QuantizedRows& out, int index);
  // Results of rows [first, last) in the columns of one pair.
  void (*multiply)(const PackedWeights& weights, const QuantizedRows& rows, int first, int last, int pair,
                   const Epilogue& epilogue);
  // The same by way of `panel`, blocks * panel_bytes of scratch, aligned to 64 bytes.
  void (*multiply_panel)(const PackedWeights& weights, uint8_t* panel, const QuantizedRows& rows, int first, int last,
                         int pair, const Epilogue& epilogue);
};

extern const BlockKernels kAvx512Vnni;
extern const BlockKernels kAvx2;
#if defined(__clang__) || __GNUC__ >= 11
#define STARLING_COMPILES_AVX_VNNI  // which GCC 10 does not know
extern const BlockKernels kAvxVnni;
#endif
extern const BlockKernels kNeonI8mm;  // with products of matrices for many rows
extern const BlockKernels kNeon;

// The best this processor can run; nullptr where it can run none.
const BlockKernels* block_kernels();

}  // namespace starling
