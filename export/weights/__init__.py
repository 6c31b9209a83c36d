"""Weights: first a plan, then a file that is written tensor by tensor."""
