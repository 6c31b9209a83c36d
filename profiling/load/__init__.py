"""Many requests at once, in this process or against a server."""
