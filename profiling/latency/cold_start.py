"""From nothing to the first token: a fresh process that imports, loads the bundle, and generates one token.

`python -m starling.profiling.latency.cold_start BUNDLE …` is that process; `measure_cold_start` runs it and holds the
watch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from starling.engine.errors import BackendError

TIMEOUT_S = 900


@dataclass(frozen=True, slots=True)
class ColdStart:
    """Seconds from the start of the process to its first token, and their parts.

    `process_s` is the interpreter's own start and everything else that no part names. The bundle's files are in the
    page cache if somebody has read them lately: the disk is not part of the figure.
    """

    total_s: float
    process_s: float
    import_s: float
    load_s: float
    first_token_s: float


def measure_cold_start(bundle: Path, *, prompt_tokens: int, max_seq: int, **options: str | int | None) -> ColdStart:
    """Start a process and wait for its first token; `options` are further arguments of Engine.

    Raises BackendError where it fails.
    """
    settings = {"prompt_tokens": prompt_tokens, "max_seq": max_seq}
    command = [
        sys.executable,
        "-m",
        "starling.profiling.latency.cold_start",
        str(bundle),
        json.dumps([settings, options]),
    ]
    begin = perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None  # PIPE was asked for
        line = process.stdout.readline()
        total = perf_counter() - begin
        _, errors = process.communicate(timeout=TIMEOUT_S)
    if process.returncode or not line:
        reason = (errors.strip().splitlines() or ["no message"])[-1]
        raise BackendError(f"the fresh process for the cold start failed: {reason}; try --no-cold-start")
    parts: dict[str, float] = json.loads(line)
    return ColdStart(total, total - sum(parts.values()), **parts)


def main(bundle: str, settings: dict[str, int], options: dict[str, Any]) -> None:
    """The fresh process: prints its parts once the first token is there."""
    begin = perf_counter()
    from starling.engine.engine import Engine
    from starling.profiling.exact_prompts import prompt_tokens

    imported = perf_counter()
    with Engine(bundle, max_seq=settings["max_seq"], **options) as engine:
        loaded = perf_counter()
        engine.generate(prompt_tokens(engine.tokenizer, settings["prompt_tokens"], 0), max_tokens=1, ignore_eos=True)
        first = perf_counter()
        parts = {"import_s": imported - begin, "load_s": loaded - imported, "first_token_s": first - loaded}
        print(json.dumps(parts), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *json.loads(sys.argv[2]))
