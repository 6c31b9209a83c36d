"""Offline batches: a file of prompts to a file of results, each exactly once whatever interrupts the run."""
