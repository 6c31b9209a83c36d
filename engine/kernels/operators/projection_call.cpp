#include "operators/projection_call.h"

namespace starling {

Projection read_projection(const NodeInfo& node) {
  Projection made;
  made.inputs = to_int(node.integer("K"), "K or N is unusable");
  made.outputs = to_int(node.integer("N"), "K or N is unusable");
  made.gated = node.integer("gated") != 0;
  require(made.inputs > 0 && made.outputs > 0 && (!made.gated || made.outputs % 2 == 0), "K or N is unusable");
  made.pairs = made.gated ? ceil_div(made.outputs / 2, kTile) : ceil_div(made.outputs, kPair);
  return made;
}

ProjectionCall read_call(const Call& call, const Projection& projection, float epsilon, size_t norm_weight,
                         int planes) {
  const size_t bias = norm_weight + 1, residual = norm_weight + 2;
  Shape shape = call.input_shape(0);
  require(shape.rank > 0 && shape.back() == projection.inputs, "x's last axis is not K");
  const int rows = to_int(times(shape.elements() / projection.inputs, planes), "x has too many rows") / planes;
  const auto has = [&](size_t input, int64_t elements) {
    const ort::Value* value = call.input(input);
    return value == nullptr || shape_of(call.api, value).elements() == elements;
  };
  require(has(norm_weight, projection.inputs) && has(bias, projection.outputs),
          "the norm's weight or the bias has another length");
  require(has(residual, int64_t{rows} * projection.width()), "the residual has another shape");
  shape.dims[shape.rank - 1] = projection.width();
  return {call.input_data<float>(0),
          rows,
          {call.input_data<float>(norm_weight), epsilon},
          {call.input_data<float>(bias), call.input_data<float>(residual), call.output<float>(0, shape)}};
}

}  // namespace starling
