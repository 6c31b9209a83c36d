"""Checkpoints whose weights are quantized: their settings, how each method lays weights out, their values."""
