"""What runs a model: the protocol of a backend, and one package for each runtime."""
