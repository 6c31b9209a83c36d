// The operator starling::QuantizedLinear of a decoder's projections.
#pragma once

#include <array>

#include "operators/op.h"
#include "product/block_product.h"

namespace starling {

// y [..., N] = x [..., K] · weightsᵀ, N halved where the weights are gated. Attributes: K, N, bits (8), block_size
// (32), planes (1 or 2), gated, epsilon. The weights are packed when the kernel is made.
class QuantizedLinear {
 public:
  static constexpr const char* name = "QuantizedLinear";
  // x [..., K], data [N, ceil(K / 32), 32], scales [N, ceil(K / 32)], norm_weight [K], bias [N], residual [..., N]
  static constexpr std::array<InputSpec, 6> inputs = {
      {{ort::kFloat}, {ort::kUInt8}, {ort::kFloat}, {ort::kFloat, true}, {ort::kFloat, true}, {ort::kFloat, true}}};
  static constexpr size_t outputs = 1;
  static constexpr ort::ElementType output_type = ort::kFloat;
  static constexpr const char* provider = "CPUExecutionProvider";

  QuantizedLinear(const NodeInfo& node, NoContext);
  void compute(const Call& call) const;

 private:
  PackedWeights weights_;
  float epsilon_;
  const BlockKernels* kernels_;
};

}  // namespace starling
