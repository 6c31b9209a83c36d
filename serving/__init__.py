"""Serve a bundle to many clients: OpenAI's HTTP API, offline batches, and the metrics that both report."""
