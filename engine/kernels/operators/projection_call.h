// What the operators of projections read alike, whatever their weights: their shape, and one call's tensors.
#pragma once

#include "operators/op.h"
#include "product/projection.h"

namespace starling {

// By the attributes K, N and gated. Throws where they are unusable.
Projection read_projection(const NodeInfo& node);

// x [rows][inputs], and what is done before and after the product.
struct ProjectionCall {
  const float* x;
  int rows;
  Norm norm;
  Epilogue epilogue;
};

// Input 0 is x [..., inputs]; those from `norm_weight` on are the norm's weight [inputs], the bias [outputs] and the
// residual [..., width], each of which may be missing. Makes the output [..., width]. Throws where they do not fit, or
// rows * planes is too many.
ProjectionCall read_call(const Call& call, const Projection& projection, float epsilon, size_t norm_weight, int planes);

}  // namespace starling
