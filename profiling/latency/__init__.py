"""Time to first token, inter-token latency and throughput of a bundle."""
