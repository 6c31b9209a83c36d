"""A bundle: the folder that an export writes and the engine runs."""
