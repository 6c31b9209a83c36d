"""Triton Inference Server: the model repository that `starling triton` writes, and the Python models in it.

Three models: one holds the engine, and two entries speak to it through a local socket: one with the names of the
TensorRT-LLM ensemble, one with those of Triton's vLLM backend. Each Triton model runs in a process of its own.
"""
