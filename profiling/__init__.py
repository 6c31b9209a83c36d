"""Measure a bundle on this machine: latency, throughput, memory, bandwidth."""
