// HalfLinear: RMSNorm, product with weights of 16 bits, + bias, silu(gate) * value, + residual.
#include "operators/half_linear.h"

#include <algorithm>

#include "operators/projection_call.h"

namespace starling {
namespace {

enum Input : size_t { kX, kWeight, kNormWeight };

// One weight of a matrix as it is stored.
struct Stored {
  const uint16_t* data;
  size_t row_stride, input_stride;

  uint16_t at(size_t row, size_t input) const { return data[row * row_stride + input * input_stride]; }
};

// One piece of 32 inputs and 16 outputs.
void pack_tile(const HalfWeights& packed, const Stored& stored, int pair, int block, int tile, bool pairs_inputs,
               uint16_t* out) {
  const int inputs = std::min(kHalfBlock, packed.inputs - block * kHalfBlock);
  std::fill_n(out, kHalfTileSize, uint16_t{0});
  for (int lane = 0; lane < kTile; ++lane) {
    const int row = packed.row_of(pair, tile, lane);
    if (row == packed.outputs) continue;
    for (int i = 0; i < inputs; ++i) {
      const int place = pairs_inputs ? (i / 2 * kTile + lane) * 2 + i % 2 : i * kTile + lane;
      out[place] = stored.at(row, static_cast<size_t>(block) * kHalfBlock + i);
    }
  }
}

}  // namespace

HalfLinear::HalfLinear(const NodeInfo& node, bool is_bfloat16) : kernels_(half_kernels(is_bfloat16)) {
  require(kernels_ != nullptr, kNoKernels);
  HalfWeights& packed = weights_;
  static_cast<Projection&>(packed) = read_projection(node);
  packed.blocks = ceil_div(packed.inputs, kHalfBlock);
  epsilon_ = node.real("epsilon");
  const bool transposed = node.integer("transposed") != 0;

  const ort::Value* weight = node.initializer(kWeight, "the weights are no initializer");
  const Shape shape = shape_of(node.api, weight);
  require(shape.rank == 2 && shape[transposed ? 0 : 1] == packed.inputs && shape[transposed ? 1 : 0] == packed.outputs,
          "the weights do not have the shape that K and N say");
  const auto* data = data_of<const uint16_t>(node.api, weight);
  const size_t inputs = packed.inputs, outputs = packed.outputs;
  const Stored stored = transposed ? Stored{data, 1, outputs} : Stored{data, inputs, 1};
  packed.data = Weights<uint16_t>(static_cast<size_t>(packed.pairs) * packed.blocks * 2 * kHalfTileSize);
  uint16_t* out = packed.data.data();
  for (int pair = 0; pair < packed.pairs; ++pair) {
    for (int block = 0; block < packed.blocks; ++block) {
      for (int tile = 0; tile < 2; ++tile, out += kHalfTileSize) {
        pack_tile(packed, stored, pair, block, tile, is_bfloat16, out);
      }
    }
  }
  page_out(data, inputs * outputs * sizeof(uint16_t));
}

void HalfLinear::compute(const Call& call) const {
  const ProjectionCall of = read_call(call, weights_, epsilon_, kNormWeight, 1);
  const int inputs = weights_.inputs, rows = of.rows, blocks = weights_.blocks;
  thread_local Array<uint8_t> memory;
  const PreparedRows prepared{grow(memory, PreparedRows::bytes(rows, blocks)), blocks};
  const auto prepare = [&](size_t row) { kernels_->prepare(of.x + row * inputs, inputs, of.norm, prepared, row); };
  constexpr int kSerialRows = 4;  // waking the other threads costs more than preparing this few
  if (rows <= kSerialRows) {
    for (int row = 0; row < rows; ++row) prepare(row);
  } else {
    call.parallel(rows, prepare);
  }

  // Neighbouring tasks share their rows, which stay in a core's cache while the weights pass by.
  constexpr int kRowsOfTask = 128;
  static_assert(kRowsOfTask % kRowsTogether == 0);
  const size_t groups = std::max(ceil_div(rows, kRowsOfTask), 1), pairs = weights_.pairs;
  call.parallel(groups * pairs, [&](size_t task) {
    const int first = static_cast<int>(task / pairs) * kRowsOfTask, pair = static_cast<int>(task % pairs);
    kernels_->multiply(weights_, prepared, first, std::min(first + kRowsOfTask, rows), pair, of.epilogue);
  });
}

}  // namespace starling
