// Many rows of weights of 4 bits. Included inside a target region, after block_multiply.h.
#pragma once

namespace starling {
namespace {

template <int MostRows>
inline void multiply_panel(const PackedWeights& weights, uint8_t* panel, const QuantizedRows& rows, int first, int last,
                           int pair, const Epilogue& epilogue) {
  unpack(weights.of_pair(pair), weights.blocks, panel);
  if (weights.zeros.data() == nullptr) {
    return multiply_format<UnpackedInt4, MostRows>(weights, panel, rows, first, last, pair, epilogue);
  }
  multiply_format<UnpackedInt4WithZeros, MostRows>(weights, panel, rows, first, last, pair, epilogue);
}

}  // namespace
}  // namespace starling
