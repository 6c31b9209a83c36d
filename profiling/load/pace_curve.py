"""What a long prompt costs the streams beside it and itself, by how much they may be slowed down.

`python -m starling.profiling.load.pace_curve BUNDLE` runs streams, has a prompt of 1,024 tokens prefilled beside them
under one slowdown after another, taking turns, and gives the p95 of the streams' inter-token latencies against their
quiet ones, and the prompt's time to first token.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import click

from starling.engine.engine import Engine
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.serving_loop import ServingLoop
from starling.profiling.exact_prompts import prompt_tokens
from starling.profiling.load.in_process import Interference, measure_interference
from starling.profiling.machine.environment import describe_environment
from starling.profiling.programs import failing_in_one_line, write_document
from starling.profiling.reports.profile_document import bundle_document

SLOWDOWNS = (1.2, 1.5, 2.0, 3.0)
PROMPT_TOKENS = 128
QUIET_TOKENS = 40


def measure(engine: Engine, long: int, rounds: int, slowdowns: tuple[float, ...]) -> dict[float, list[Interference]]:
    """`rounds` measurements of each slowdown beside one stream and beside all but one of the rows."""
    prompts = [prompt_tokens(engine.tokenizer, PROMPT_TOKENS, number) for number in range(engine.max_batch)]
    prompt = prompt_tokens(engine.tokenizer, long, engine.max_batch)
    found: dict[float, list[Interference]] = {slowdown: [] for slowdown in slowdowns}
    for _ in range(rounds):
        for slowdown in slowdowns:
            # Known prefixes would leave nothing to prefill.
            with ServingLoop(engine, slowdown=slowdown, prefix_cache=0) as loop:
                alone = loop.submit(prompt, SamplingParams(max_tokens=1)).result().timings.ttft_ms
                for streams in (1, engine.max_batch - 1):
                    # What is measured comes after one such prompt, from which the loop has learned.
                    for _ in range(2):
                        newest = measure_interference(
                            loop, prompts[:streams], prompt, quiet_tokens=QUIET_TOKENS, alone_ms=alone
                        )
                    found[slowdown].append(newest)
    return found


def points(found: dict[float, list[Interference]]) -> list[dict[str, Any]]:
    """Medians over the rounds, by streams and slowdown."""
    made = []
    for streams in sorted({each.streams for rounds in found.values() for each in rounds}):
        for slowdown, rounds in found.items():
            theirs = [each for each in rounds if each.streams == streams]
            made.append(
                {
                    "streams": streams,
                    "slowdown": slowdown,
                    "p95_ratio": median(each.ratio for each in theirs),
                    "p50_ratio": median(each.prefill_p50_ms / each.quiet_p50_ms for each in theirs),
                    "quiet_p95_ms": median(each.quiet_p95_ms for each in theirs),
                    "prefill_p95_ms": median(each.prefill_p95_ms for each in theirs),
                    "ttft_ms": median(each.ttft_ms for each in theirs),
                    "ttft_alone_ms": median(each.ttft_alone_ms for each in theirs),
                }
            )
    return made


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--streams", type=click.IntRange(2), default=8, help="Rows; up to one fewer streams run.")
@click.option("--long-prompt", type=click.IntRange(16), default=1024, help="Tokens of the prompt beside them.")
@click.option("--slowdown", type=float, multiple=True, default=SLOWDOWNS, help="As of ServingLoop; repeatable.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Measurements of each slowdown.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the CPU backend.  [default: physical cores]")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON document here too.")
def command(bundle: Path, streams: int, long_prompt: int, rounds: int, threads: int | None, **options: Any) -> None:
    """Measure inter-token latency of running streams against a long prompt's time to first token."""
    slowdowns = tuple(options["slowdown"])
    with (
        failing_in_one_line(),
        Engine(bundle, max_seq=long_prompt + 1024, max_batch=streams, threads=threads) as engine,
    ):
        found = measure(engine, long_prompt, rounds, slowdowns)
        document = {
            "format": "starling-pace-curve",
            "format_version": 1,
            "environment": asdict(describe_environment()),
            "bundle": bundle_document(engine.bundle),
            "run": {"prompt_tokens": long_prompt, "rounds": rounds, "threads": threads},
            "points": points(found),
            "rounds": {str(slowdown): [asdict(each) for each in theirs] for slowdown, theirs in found.items()},
        }
    write_document(document, options["output"])
    for point in points(found):
        click.echo(
            "{streams} stream(s), slowdown {slowdown}: ITL p95 {quiet_p95_ms:.1f} -> {prefill_p95_ms:.1f} ms, "
            "x {p95_ratio:.2f} (p50 x {p50_ratio:.2f}); TTFT {ttft_ms:.0f} ms, alone {ttft_alone_ms:.0f}".format(
                **point
            )
        )


if __name__ == "__main__":
    command()
