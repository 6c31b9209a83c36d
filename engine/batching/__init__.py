"""Many requests over one KV cache: the scheduler's step, its rows, drafts, and the pace of prefills."""
