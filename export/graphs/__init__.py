"""Rewrites of a traced graph, and the companion graphs of a bundle."""
