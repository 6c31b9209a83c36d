"""One trace of a PyTorch model, lowered to a dialect."""
