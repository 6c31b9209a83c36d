"""Compare Starling with other runtimes on one machine, in one run.

`install.py` makes the environments and the models that `catalogue.py` lists, `compare.py` measures them beside us.

Every contender is a long-lived subprocess of its own Python, because runtimes need versions of the same libraries that
cannot live in one environment. `workers/worker.py` is the program of all of them; it is run as a plain script with the
name of a module beside it (`python worker.py genai_worker`), and needs nothing of Starling's, so a peer's environment
holds only the peer. A further peer is an entry of the catalogue, a module with a `Worker` class (see `workers.worker`)
and, where it has models of its own, one that makes them (see `makers.maker`).

The protocol is one JSON object a line, requests on the worker's stdin, one reply each on its stdout (stray prints of
the runtime go to stderr). All times are milliseconds.

    {"op": "open", "model": FOLDER, "threads": int, "capacity": int, "device": "cpu" | "cuda", "settings": {…}}
        capacity: prompt and new tokens of one run; settings: the runtime's own, of the catalogue
        -> {"load_ms": float, "versions": {package: version}}
    {"op": "run", "prompt": [int], "new_tokens": int}                     greedy, goes on after end tokens
        -> {"setup_ms": float, "ttft_ms": float, "itl_ms": [float], "tokens": [int], "peak_rss_bytes": int | null}
    {"op": "streams", "prompts": [[int]], "new_tokens": int}              the same for several prompts at once
        -> {"streams": [{"arrivals_ms": [float], "tokens": [int]}]}       where the worker batches; since the request
    {"op": "logits", "tokens": [[int]], "context": int, "file": PATH}     written to the file, see stored_logits.py
        -> {"shape": [rows, window - context, vocab]}
    {"op": "cpu"}                                                         CPU time that the process has used so far
        -> {"cpu_ms": float}

A request that fails is answered with {"error": "one line"}. The worker ends when its stdin ends. `ttft_ms` counts from
handing over the prompt to the first token; what a runtime allocates per request before that is `setup_ms`, so that a
peer is not charged for it.
"""
