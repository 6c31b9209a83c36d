"""A GPU as ONNX Runtime's and TensorRT's backends both use it: memory, streams, steps that are launched ahead."""
