"""What is made on a machine without a GPU: graphs without their weights, and a small ONNX Runtime."""

#: ONNX Runtime in the kit.
ARCHIVE = "onnxruntime.tar.xz"
