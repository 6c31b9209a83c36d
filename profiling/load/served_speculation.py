"""What speculation gains and loses when several requests run together in a serving loop.

`python -m starling.profiling.load.served_speculation BUNDLE` answers the prompts of `speculation_gain` on one engine,
with and without drafts, by prompt lookup or, with `--draft`, by a draft model, taking turns; tokens must be the same.
The gain is the ratio of all tokens per second, as long as every row has a request: what the last ones do alone says
nothing of a busy server.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import click

from starling.engine.bundle.manifest import Bundle
from starling.engine.engine import Engine
from starling.engine.generation.results import GenerationChunk, GenerationResult
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.names import Speculation
from starling.engine.serving_loop import ServingLoop
from starling.profiling.load.speculation_gain import KINDS, METHOD, prompt_ids, read_texts
from starling.profiling.machine.environment import describe_environment
from starling.profiling.programs import failing_in_one_line, write_document
from starling.profiling.reports.profile_document import bundle_document

#: Requests for each row at least.
ROUNDS_OF_ROWS = 5


@dataclass(frozen=True, slots=True)
class ServedGain:
    """One kind of prompts: tokens per second of all streams in each round, and of the drafts how many were taken."""

    kind: str
    prompts: int
    same_tokens: bool
    tokens_per_second_without: list[float]
    tokens_per_second_with: list[float]
    gain: float
    drafted_tokens: int
    accepted_tokens: int


def measure(engine: Engine, kind: str, params: SamplingParams, rounds: int) -> ServedGain:
    """Answer all prompts of a kind both ways, `rounds` times. Raises BackendError where the engine cannot speculate."""
    method = _method(engine)
    prompts = [prompt_ids(engine, text.text) for text in read_texts() if text.kind == kind]
    rates: dict[str | None, list[float]] = {None: [], method: []}
    answers: dict[str | None, list[GenerationResult]] = {}
    for number in range(rounds):
        for how in (None, method) if number % 2 == 0 else (method, None):
            engine.speculation = how
            answers[how], rate = _serve(engine, prompts, params)
            rates[how].append(rate)
    timings = [answer.timings for answer in answers[method]]
    return ServedGain(
        kind=kind,
        prompts=len(prompts),
        same_tokens=[answer.tokens for answer in answers[None]] == [answer.tokens for answer in answers[method]],
        tokens_per_second_without=rates[None],
        tokens_per_second_with=rates[method],
        gain=median(rates[method]) / median(rates[None]),
        drafted_tokens=sum(timing.drafted_tokens for timing in timings),
        accepted_tokens=sum(timing.accepted_tokens for timing in timings),
    )


def _method(engine: Engine) -> Speculation:
    return METHOD if engine.draft is None else "draft-model"


def _serve(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> tuple[list[GenerationResult], float]:
    """The prompts' answers, and the tokens per second of all streams while all rows were busy, prefills included.

    The prompts are asked again until there are ROUNDS_OF_ROWS requests for each row; no prefix is known.
    """
    rows = engine.max_batch
    asked = [prompts[number % len(prompts)] for number in range(max(len(prompts), ROUNDS_OF_ROWS * rows))]
    moments: list[float] = []
    ends: list[float] = []

    def note(chunk: GenerationChunk) -> None:
        moments.append(perf_counter())
        if chunk.finish_reason is not None:
            ends.append(moments[-1])

    with ServingLoop(engine, prefix_cache=0) as loop:
        begin = perf_counter()
        handles = [loop.submit(prompt, params, reply=True, on_chunk=note) for prompt in asked]
        answers = [handle.result() for handle in handles]
    first_idle = ends[-rows]
    busy = sum(moment <= first_idle for moment in moments)
    return answers[: len(prompts)], busy / (first_idle - begin)


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--draft", type=click.Path(path_type=Path), help="Bundle that drafts.  [default: prompt lookup]")
@click.option("--streams", type=click.IntRange(1), default=4, help="Requests that run together.")
@click.option("--new-tokens", type=click.IntRange(2), default=96, help="Tokens of an answer.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Times that all prompts are answered both ways.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the CPU backend.  [default: physical cores]")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON document here too.")
def command(
    bundle: Path,
    draft: Path | None,
    streams: int,
    new_tokens: int,
    rounds: int,
    threads: int | None,
    output: Path | None,
) -> None:
    """Measure what speculation brings to several streams. Exit code 1 where tokens are not the same."""
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    with failing_in_one_line(), Engine(bundle, max_batch=streams, threads=threads, draft=draft) as engine:
        engine.backend.check_verifies()
        gains = [measure(engine, kind, params, rounds) for kind in KINDS]
        document: dict[str, Any] = {
            "format": "starling-served-speculation",
            "format_version": 1,
            "environment": asdict(describe_environment()),
            "bundle": bundle_document(engine.bundle),
            "run": {
                "streams": streams,
                "new_tokens": new_tokens,
                "rounds": rounds,
                "speculation": _method(engine),
                "draft": None if draft is None else bundle_document(Bundle.open(draft)),
            },
            "gains": [asdict(gain) for gain in gains],
        }
    write_document(document, output)
    for gain in gains:
        click.echo(
            f"{gain.kind}: {gain.prompts} prompts, {streams} streams, "
            f"{'the same' if gain.same_tokens else 'OTHER'} tokens, "
            f"{median(gain.tokens_per_second_without):.1f} -> {median(gain.tokens_per_second_with):.1f} tokens/s "
            f"({gain.gain:.2f}), {gain.accepted_tokens} of {gain.drafted_tokens} drafted tokens accepted"
        )
    sys.exit(not all(gain.same_tokens for gain in gains))


if __name__ == "__main__":
    command()
