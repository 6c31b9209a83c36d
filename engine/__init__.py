"""Run a bundle: tokenizer, sampling, backends and the decode loop. Imports neither torch, transformers nor onnx."""
