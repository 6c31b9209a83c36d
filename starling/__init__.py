"""Starling: an ONNX/TensorRT optimized inference backend for decoder LLMs.

`starling.engine` runs bundles, `starling.export` makes them; `starling.profiling` measures and `starling.serving`
serves. In a checkout the packages are links to its top-level folders.
"""

__version__ = "0.1.0"
