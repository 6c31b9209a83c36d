"""The exported bundle against the PyTorch model, on real text."""
