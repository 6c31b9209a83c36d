"""Triton Inference Server: the model repository that `starling triton` writes, and the Python models in it.

Of a bundle that generates, four models: one holds the engine, and three entries speak to it through a local socket,
with the names of TensorRT-LLM's ensemble, of its llmapi model, and of Triton's vLLM backend. Each Triton model runs
in a process of its own. Of a bundle that scores or embeds, one model.
"""
