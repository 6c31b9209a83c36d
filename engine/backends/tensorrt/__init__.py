"""TensorRT and TensorRT for RTX: plans are built from a bundle, and run on an NVIDIA GPU."""
