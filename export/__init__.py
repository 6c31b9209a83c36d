"""From a checkpoint to a bundle: read, trace, lower to a dialect, stream the weights."""
