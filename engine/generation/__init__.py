"""One sequence: its settings, the choice of its tokens, its text, and its result."""
