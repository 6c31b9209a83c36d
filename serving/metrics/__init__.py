"""The metrics of a service: one table, for Prometheus and for Triton."""
