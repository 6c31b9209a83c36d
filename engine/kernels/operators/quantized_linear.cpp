// QuantizedLinear: RMSNorm, product with block-quantized weights, + bias, silu(gate) * value, + residual.
#include "operators/quantized_linear.h"

#include <algorithm>
#include <cstring>

namespace starling {
namespace {

constexpr int kRowsOfPanel = 24;  // from which on unpacking a pair's weights first costs less than it saves

enum Input : size_t { kX, kData, kScales, kNormWeight, kBias, kResidual, kZeroPoints };

uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude == 0) return 0;
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  const int dropped = exponent >= -14 ? 13 : 13 + (-14 - exponent);  // subnormal float16: fewer digits
  require(exponent <= 15 && dropped < 24 && (mantissa & ((1u << dropped) - 1)) == 0,
          "a scale is not a float16: export the model again");
  const uint32_t kept = mantissa >> dropped, sign = (bits >> 16) & 0x8000u;
  const uint32_t half = exponent >= -14 ? (static_cast<uint32_t>(exponent + 15) << 10) | (kept & 0x3ffu) : kept;
  return static_cast<uint16_t>(half | sign);
}

// What the graph has of the weights.
struct Stored {
  const uint8_t* data;
  const float* scales;
  const uint8_t* zeros;  // nullptr: there are none
};

// Four bytes of four nibbles, the first of which is the lowest.
uint32_t spread_nibbles(const uint8_t* two_bytes) {
  const uint32_t four = two_bytes[0] | static_cast<uint32_t>(two_bytes[1]) << 8;
  return (four & 0xF) | (four & 0xF0) << 4 | (four & 0xF00) << 8 | (four & 0xF000) << 12;
}

// A block of a row, nullptr where there is no row, into the places of its lane in eight steps.
void pack_bytes(uint8_t* out, const uint8_t* block, uint32_t flipped) {
  for (int step = 0; step < kBlock / 4; ++step) {
    uint32_t four = 0x80808080;
    if (block != nullptr) std::memcpy(&four, block + step * 4, sizeof four);
    four ^= flipped;
    std::memcpy(out + static_cast<size_t>(step) * kPair * 4, &four, sizeof four);
  }
}

void pack_nibbles(uint8_t* out, const uint8_t* low, const uint8_t* high) {
  for (int step = 0; step < kBlock / 4; ++step) {
    uint32_t four = low == nullptr ? 0 : spread_nibbles(low + step * 2);
    four |= high == nullptr ? 0 : spread_nibbles(high + step * 2) << 4;
    std::memcpy(out + static_cast<size_t>(step) * kTile * 4, &four, sizeof four);
  }
}

void pack_lane(PackedWeights& packed, int pair, int block, int lane, const Stored& stored, uint32_t flipped) {
  const size_t place = static_cast<size_t>(pair) * packed.blocks + block, bytes = kBlock * packed.bits / 8;
  uint8_t* out = packed.data.data() + place * kPair * bytes + static_cast<size_t>(lane) * 4;
  const uint8_t* blocks[2];
  uint32_t zeros = 0;
  for (int tile = 0; tile < 2; ++tile) {
    const int row = packed.row_of(pair, tile, lane);
    const bool exists = row < packed.outputs;
    const size_t source = static_cast<size_t>(row) * packed.blocks + block;
    packed.scales.data()[place * kPair + tile * kTile + lane] = exists ? half_bits(stored.scales[source]) : 0;
    blocks[tile] = exists ? stored.data + source * bytes : nullptr;
    if (packed.bits == 8) pack_bytes(out + static_cast<size_t>(tile) * kTile * 4, blocks[tile], flipped);
    if (exists && stored.zeros != nullptr) {
      const uint8_t* zeros_of_row = stored.zeros + static_cast<size_t>(row) * ceil_div(packed.blocks, 2);
      zeros |= (zeros_of_row[block / 2] >> (block % 2 * 4) & 0xFu) << (tile * 4);
    }
  }
  if (packed.bits == 4) pack_nibbles(out, blocks[0], blocks[1]);
  if (stored.zeros != nullptr) packed.zeros.data()[place * kTile + lane] = static_cast<uint8_t>(zeros);
}

void pack(PackedWeights& packed, const Stored& stored, uint8_t flipped) {
  const size_t places = static_cast<size_t>(packed.pairs) * packed.blocks;
  packed.data = Weights<uint8_t>(places * kPair * kBlock * packed.bits / 8);
  packed.scales = Weights<uint16_t>(places * kPair);
  if (stored.zeros != nullptr) packed.zeros = Weights<uint8_t>(places * kTile);
  for (int pair = 0; pair < packed.pairs; ++pair) {
    for (int block = 0; block < packed.blocks; ++block) {
      for (int lane = 0; lane < kTile; ++lane) pack_lane(packed, pair, block, lane, stored, flipped * 0x01010101u);
    }
  }
}

// Of a call's rows (or planes of rows) those of `task`: so many that there are enough tasks for many threads.
struct RowsOfTask {
  static constexpr int kMost = 96;
  int first, last;

  RowsOfTask(int task, int rows) : first(task * kMost), last(std::min(first + kMost, rows)) {}
};

}  // namespace

QuantizedLinear::QuantizedLinear(const NodeInfo& node, NoContext) : kernels_(block_kernels()) {
  require(kernels_ != nullptr, kNoKernels);
  PackedWeights& packed = weights_;
  static_cast<Projection&>(packed) = read_projection(node);
  packed.planes = to_int(node.integer("planes"), "planes must be 1 or 2");
  packed.bits = to_int(node.integer("bits"), "weights must have 8 or 4 bits");
  require(packed.bits == 8 || packed.bits == 4, "weights must have 8 or 4 bits");
  require(node.integer("block_size") == kBlock, "weights must be in blocks of 32");
  require(packed.planes == 1 || packed.planes == 2, "planes must be 1 or 2");
  packed.blocks = ceil_div(packed.inputs, kBlock);
  epsilon_ = node.real("epsilon");

  const ort::Value* data = node.initializer(kData, "the weights are no initializer");
  const ort::Value* scales = node.initializer(kScales, "the scales are no initializer");
  const ort::Value* zeros = node.initializer_if_any(kZeroPoints);
  const auto has = [&](const ort::Value* value, int64_t elements) {
    return shape_of(node.api, value).elements() == elements;
  };
  const int64_t blocks = int64_t{packed.outputs} * packed.blocks, bytes = blocks * (kBlock * packed.bits / 8);
  require(has(data, bytes) && has(scales, blocks), "the weights do not have the shapes that K and N say");
  require(zeros == nullptr || packed.bits == 4, "zero points are for weights of 4 bits");
  require(zeros == nullptr || has(zeros, int64_t{packed.outputs} * ceil_div(packed.blocks, 2)),
          "the zero points do not have the shape that K and N say");
  const Stored stored{data_of<const uint8_t>(node.api, data), data_of<const float>(node.api, scales),
                      zeros == nullptr ? nullptr : data_of<const uint8_t>(node.api, zeros)};
  pack(packed, stored, kernels_->flipped);
  page_out(stored.data, static_cast<size_t>(bytes));
  page_out(stored.scales, static_cast<size_t>(blocks) * sizeof(float));
}

void QuantizedLinear::compute(const Call& call) const {
  require(weights_.zeros.data() != nullptr || call.input(kZeroPoints) == nullptr, "the zero points are no initializer");
  const ProjectionCall of = read_call(call, weights_, epsilon_, kNormWeight, weights_.planes);
  const int rows = of.rows * weights_.planes;
  const size_t panel_bytes = rows < kRowsOfPanel ? 0 : kernels_->panel_bytes[weights_.bits == 4] * weights_.blocks;
  const QuantizedRows quantized = round_rows(call, of, panel_bytes != 0 && kernels_->panel_takes_words);

  const int groups = std::max(ceil_div(rows, RowsOfTask::kMost), 1);
  call.parallel(static_cast<size_t>(weights_.pairs) * groups, [&](size_t task) {
    const RowsOfTask some(static_cast<int>(task % groups), rows);
    const int pair = static_cast<int>(task / groups);
    if (panel_bytes == 0 || some.last - some.first < kRowsOfPanel) {
      return kernels_->multiply(weights_, quantized, some.first, some.last, pair, of.epilogue);
    }
    thread_local Array<uint8_t> panel;
    kernels_->multiply_panel(weights_, grow(panel, panel_bytes), quantized, some.first, some.last, pair, of.epilogue);
  });
}

QuantizedRows QuantizedLinear::round_rows(const Call& call, const ProjectionCall& of, bool has_words) const {
  thread_local Array<int8_t> values;
  thread_local Array<int16_t> words;
  thread_local Array<float> scales;
  thread_local Array<int32_t> corrections;
  const size_t blocks = static_cast<size_t>(of.rows) * weights_.planes * weights_.blocks;
  const QuantizedRows rounded{grow(values, blocks * kBlock),
                              has_words ? grow(words, blocks * kBlock) : nullptr,
                              grow(scales, blocks),
                              grow(corrections, blocks),
                              weights_.blocks,
                              weights_.planes};
  const auto round_row = [&](size_t row) {
    kernels_->quantize(of.x + row * weights_.inputs, weights_.inputs, of.norm, rounded, static_cast<int>(row));
  };
  constexpr int kSerialRows = 4;  // waking the other threads costs more than rounding this few
  if (of.rows <= kSerialRows) {
    for (int row = 0; row < of.rows; ++row) round_row(row);
  } else {
    call.parallel(of.rows, round_row);
  }
  return rounded;
}

}  // namespace starling
