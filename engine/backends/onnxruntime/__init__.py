"""Bundles of every dialect on ONNX Runtime, on the CPU or with CUDA."""
