// The operator starling::HalfLinear of a decoder's projections: weights of 16 bits.
#pragma once

#include <array>

#include "operators/op.h"
#include "product/half_product.h"

namespace starling {

// y [..., N] = x [..., K] · weightsᵀ, N halved where the weights are gated. Attributes: K, N, transposed (the weight is
// stored [K, N] instead of [N, K]), gated, epsilon. The weights are packed when the kernel is made.
class HalfLinear {
 public:
  static constexpr const char* name = "HalfLinear";
  static constexpr std::array<ort::ElementType, 1> outputs = {ort::kFloat};
  static constexpr const char* provider = "CPUExecutionProvider";

  HalfLinear(const NodeInfo& node, bool is_bfloat16);
  void compute(const Call& call) const;

 private:
  HalfWeights weights_;
  float epsilon_;
  const HalfKernels* kernels_;
};

// With x [..., K], weight of `Type` [N, K] or [K, N], norm_weight [K], bias [N], residual [..., N]. ONNX Runtime takes
// the one whose types are the node's.
template <ort::ElementType Type>
class HalfLinearOf : public HalfLinear {
 public:
  static constexpr std::array<InputSpec, 5> inputs = {
      {{ort::kFloat}, {Type}, {ort::kFloat, true}, {ort::kFloat, true}, {ort::kFloat, true}}};

  HalfLinearOf(const NodeInfo& node, NoContext) : HalfLinear(node, Type == ort::kBFloat16) {}
};

}  // namespace starling
