// The operator starling::QuantizedLinear of a decoder's projections.
#pragma once

#include <array>

#include "operators/op.h"
#include "operators/projection_call.h"
#include "product/block_product.h"

namespace starling {

// y [..., N] = x [..., K] · weightsᵀ, N halved where the weights are gated. Attributes: K, N, bits (8 or 4), block_size
// (32), planes (1 or 2), gated, epsilon. The weights are packed when the kernel is made.
class QuantizedLinear {
 public:
  static constexpr const char* name = "QuantizedLinear";
  // x [..., K], data [N, ceil(K / 32), 4 * bits], scales [N, ceil(K / 32)], norm_weight [K], bias [N], residual
  // [..., N], zero_points of 4 bits [N, ceil(ceil(K / 32) / 2)]. Nibbles: the first of two is the low one.
  static constexpr std::array<InputSpec, 7> inputs = {{{ort::kFloat},
                                                       {ort::kUInt8},
                                                       {ort::kFloat},
                                                       {ort::kFloat, true},
                                                       {ort::kFloat, true},
                                                       {ort::kFloat, true},
                                                       {ort::kUInt8, true}}};
  static constexpr std::array<ort::ElementType, 1> outputs = {ort::kFloat};
  static constexpr const char* provider = "CPUExecutionProvider";

  QuantizedLinear(const NodeInfo& node, NoContext);
  void compute(const Call& call) const;

 private:
  // In scratch of this thread, until its next call.
  QuantizedRows round_rows(const Call& call, const ProjectionCall& of, bool has_words) const;

  PackedWeights weights_;
  float epsilon_;
  const BlockKernels* kernels_;
};

}  // namespace starling
