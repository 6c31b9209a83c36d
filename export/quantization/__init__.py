"""Quantization: weights in blocks for ONNX Runtime, Q/DQ pairs for TensorRT.

For the latter: SmoothQuant, calibration, and the choice of what stays in high precision.
"""
