"""From a bundle to an engine plan."""
