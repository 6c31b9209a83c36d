"""The programs that make a peer's models, run in the peer's own environment: `maker.py` and one module per peer."""
