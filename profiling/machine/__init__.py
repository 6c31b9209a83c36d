"""What this machine is, what is installed on it, and what its memory and arithmetic reach."""
