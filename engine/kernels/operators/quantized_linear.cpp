// QuantizedLinear: RMSNorm, product with block-quantized weights, + bias, silu(gate) * value, + residual.
#include "operators/quantized_linear.h"

#include <algorithm>
#include <cstring>

#include "operators/projection_call.h"

namespace starling {
namespace {

enum Input : size_t { kX, kData, kScales, kNormWeight };

uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude == 0) return 0;
  const int exponent = static_cast<int>(magnitude >> 23) - 127;
  const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
  const int dropped = exponent >= -14 ? 13 : 13 + (-14 - exponent);  // subnormal float16: fewer digits
  require((bits >> 31) == 0 && exponent <= 15 && dropped < 24 && (mantissa & ((1u << dropped) - 1)) == 0,
          "a scale is not a positive float16: export the model again");
  const uint32_t kept = mantissa >> dropped;
  return static_cast<uint16_t>(exponent >= -14 ? (static_cast<uint32_t>(exponent + 15) << 10) | (kept & 0x3ffu) : kept);
}

void pack_pair(PackedWeights& packed, int pair, const uint8_t* data, const float* scales) {
  for (int block = 0; block < packed.blocks; ++block) {
    const size_t place = static_cast<size_t>(pair) * packed.blocks + block;
    uint8_t* out = packed.data.data() + place * kPair * kBlock;
    for (int tile = 0; tile < 2; ++tile) {
      for (int lane = 0; lane < kTile; ++lane) {
        const int row = packed.row_of(pair, tile, lane), at = tile * kTile + lane;
        const bool exists = row < packed.outputs;
        const size_t source = static_cast<size_t>(row) * packed.blocks + block;
        packed.scales.data()[place * kPair + at] = exists ? half_bits(scales[source]) : 0;
        for (int step = 0; step < kBlock / 4; ++step) {
          uint8_t* four = out + (static_cast<size_t>(step) * kPair + at) * 4;
          if (exists) {
            std::memcpy(four, data + source * kBlock + step * 4, 4);
          } else {
            std::memset(four, 128, 4);
          }
        }
      }
    }
  }
}

}  // namespace

QuantizedLinear::QuantizedLinear(const NodeInfo& node, NoContext) : kernels_(block_kernels()) {
  require(kernels_ != nullptr, "this processor has neither AVX-512 nor AVX2");
  PackedWeights& packed = weights_;
  static_cast<Projection&>(packed) = read_projection(node);
  packed.planes = to_int(node.integer("planes"), "planes must be 1 or 2");
  require(node.integer("block_size") == kBlock && node.integer("bits") == 8,
          "weights must have 8 bits in blocks of 32");
  require(packed.planes == 1 || packed.planes == 2, "planes must be 1 or 2");
  packed.blocks = ceil_div(packed.inputs, kBlock);
  epsilon_ = node.real("epsilon");

  const ort::Value* data = node.initializer(kData, "the weights are no initializer");
  const ort::Value* scales = node.initializer(kScales, "the scales are no initializer");
  const int64_t blocks = int64_t{packed.outputs} * packed.blocks;
  require(shape_of(node.api, data).elements() == blocks * kBlock && shape_of(node.api, scales).elements() == blocks,
          "the weights do not have the shapes that K and N say");
  const size_t places = static_cast<size_t>(packed.pairs) * packed.blocks * kPair;
  packed.data = Weights<uint8_t>(places * kBlock);
  packed.scales = Weights<uint16_t>(places);
  const auto* bytes = data_of<const uint8_t>(node.api, data);
  const auto* factors = data_of<const float>(node.api, scales);
  for (int pair = 0; pair < packed.pairs; ++pair) pack_pair(packed, pair, bytes, factors);
  page_out(bytes, static_cast<size_t>(blocks) * kBlock);
  page_out(factors, static_cast<size_t>(blocks) * sizeof(float));
}

void QuantizedLinear::compute(const Call& call) const {
  const int inputs = weights_.inputs, planes = weights_.planes;
  const ProjectionCall of = read_call(call, weights_, epsilon_, kNormWeight, planes);
  const int rows = of.rows;

  thread_local Array<int8_t> values;
  thread_local Array<float> scales;
  thread_local Array<int32_t> corrections;
  const size_t blocks = static_cast<size_t>(rows) * planes * weights_.blocks;
  const QuantizedRows quantized{grow(values, blocks * kBlock), grow(scales, blocks), grow(corrections, blocks),
                                weights_.blocks, planes};
  const auto round_row = [&](size_t row) { kernels_->quantize(of.x + row * inputs, inputs, of.norm, quantized, row); };
  constexpr int kSerialRows = 4;  // waking the other threads costs more than rounding this few
  if (rows <= kSerialRows) {
    for (int row = 0; row < rows; ++row) round_row(row);
  } else {
    call.parallel(rows, round_row);
  }

  constexpr int kRowsOfTask = 96;  // so that there are enough tasks for many threads
  const int groups = std::max(ceil_div(rows * planes, kRowsOfTask), 1);
  call.parallel(static_cast<size_t>(weights_.pairs) * groups, [&](size_t task) {
    const int pair = static_cast<int>(task / groups), first = static_cast<int>(task % groups) * kRowsOfTask;
    kernels_->multiply(weights_, quantized, first, std::min(first + kRowsOfTask, rows * planes), pair, of.epilogue);
  });
}

}  // namespace starling
