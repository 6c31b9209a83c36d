"""A plan on a GPU."""
