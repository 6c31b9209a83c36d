"""Scores and embeddings: texts that are prefilled and answered by numbers; no token is generated."""
