"""Explicit quantization for TensorRT: Q/DQ pairs, SmoothQuant, calibration, and what stays in high precision."""
