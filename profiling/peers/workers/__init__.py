"""The programs that run in the peers' own environments: `worker.py` and one module per runtime."""
