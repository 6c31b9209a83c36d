"""What drafts would gain at a given acceptance, length and cost, without a draft model.

`python -m starling.profiling.load.synthetic_acceptance BUNDLE` answers prompts once, and then again with drafts made of
the answer that is known: each drafted token is the right one with the given probability, and another one else. A run of
the draft takes as long as `--cost` says, in parts of a decode step. The verifying runs are real, and so are the tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter

import click

from starling.engine.backends.backend import Backend
from starling.engine.batching.draft_model import DraftModel
from starling.engine.batching.generation_stream import generate
from starling.engine.batching.request import Request
from starling.engine.batching.step_costs import StepCosts
from starling.engine.engine import Engine
from starling.engine.generation.results import GenerationResult
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.names import Speculation
from starling.profiling.exact_prompts import prompt_tokens
from starling.profiling.machine.environment import describe_environment
from starling.profiling.programs import failing_in_one_line, write_document
from starling.profiling.reports.profile_document import bundle_document

PROMPT_TOKENS = 128
SEED = 1


class KnownAnswers(DraftModel):
    """Drafts the known answers' tokens, each of them right with a probability, in runs of a given time."""

    def __init__(self, backend: Backend, answers: dict[tuple[int, ...], tuple[int, ...]], acceptance: float) -> None:
        super().__init__(backend)
        self._answers, self.acceptance, self._dice = answers, acceptance, Random(SEED)
        #: Tokens of each draft, and seconds that each of them takes for all rows together.
        self.length, self.token_s = 1, 0.0

    def begin(self, request: Request, source: Request | None) -> None:
        """Nothing is in a cache."""

    def draft(self, requests: Sequence[Request], costs: StepCosts, most: int) -> list[list[int]]:
        """The next tokens of each answer, of the given length as far as it goes, some of them replaced."""
        drafts = []
        for request in requests:
            done, each = len(request.sequence.tokens), min(self.length, most // len(requests))
            rest = max(0, min(each, request.sequence.limit - done - 1))
            right = self._answers[request.sequence.prompt][done : done + rest]
            drafts.append([token if self._dice.random() < self.acceptance else (token + 1) % 1000 for token in right])
        end = perf_counter() + self.token_s * max(map(len, drafts))
        while perf_counter() < end:  # a draft model keeps the processor busy
            pass
        return drafts


@dataclass(frozen=True, slots=True)
class Gain:
    """Tokens per second of all streams, as many times as without drafts, at one acceptance."""

    streams: int
    acceptance: float
    accepted_share: float
    same_tokens: bool
    tokens_per_second_without: float
    tokens_per_second_with: float
    gain: float


def measure(
    engine: Engine, streams: int, acceptances: Sequence[float], *, length: int, cost: float, tokens: int, rounds: int
) -> list[Gain]:
    """Medians over the rounds, in which each acceptance and no drafts take turns."""
    prompts = [tuple(prompt_tokens(engine.tokenizer, PROMPT_TOKENS, number)) for number in range(streams)]
    expected, _ = _answer(engine, prompts, tokens, None)
    answers = {prompt: result.tokens for prompt, result in zip(prompts, expected, strict=True)}
    draft = KnownAnswers(engine.backend, answers, 0)
    draft.length = length
    rates: dict[float | None, list[float]] = {kind: [] for kind in (None, *acceptances)}
    newest: dict[float, list[GenerationResult]] = {}
    for _ in range(rounds):
        _, rate = _answer(engine, prompts, tokens, None)
        rates[None].append(rate)
        draft.token_s = cost * streams / rate
        for acceptance in acceptances:
            draft.acceptance = acceptance
            newest[acceptance], rate = _answer(engine, prompts, tokens, draft)
            rates[acceptance].append(rate)
    return [_gain(streams, kind, rates, newest[kind], expected) for kind in acceptances]


def _gain(
    streams: int,
    acceptance: float,
    rates: dict[float | None, list[float]],
    results: list[GenerationResult],
    expected: list[GenerationResult],
) -> Gain:
    plain, drafted = median(rates[None]), median(rates[acceptance])
    seen = sum(result.timings.drafted_tokens for result in results)
    accepted = sum(result.timings.accepted_tokens for result in results)
    same = [result.tokens for result in results] == [result.tokens for result in expected]
    return Gain(streams, acceptance, accepted / max(seen, 1), same, plain, drafted, drafted / plain)


def _answer(
    engine: Engine, prompts: Sequence[tuple[int, ...]], tokens: int, draft: DraftModel | None
) -> tuple[list[GenerationResult], float]:
    """The answers, and tokens per second after the first ones."""
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    sequences = [engine.prepare(prompt, params) for prompt in prompts]
    speculation: Speculation | None = None if draft is None else "draft-model"
    begin, count = 0.0, 0
    for request, _ in generate(engine.backend, sequences, speculation, draft=draft):
        if request.sequence is sequences[-1] and not begin:
            begin = perf_counter()
        count += bool(begin)
    return [sequence.result() for sequence in sequences], (count - 1) / (perf_counter() - begin)


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--acceptance", type=click.FloatRange(0, 1), multiple=True, default=(0.5, 0.7, 0.9), help="Repeatable.")
@click.option("--length", type=click.IntRange(1, 16), default=4, help="Tokens of a draft.")
@click.option("--cost", type=click.FloatRange(0), default=0.3, help="Of a drafted token, in parts of a decode step.")
@click.option("--streams", type=click.IntRange(1), multiple=True, default=(1, 4), help="Rows; repeatable.")
@click.option("--new-tokens", type=click.IntRange(2), default=96, help="Tokens of an answer.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Times that each acceptance is measured.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the CPU backend.  [default: physical cores]")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON document here too.")
def command(
    bundle: Path,
    acceptance: tuple[float, ...],
    length: int,
    cost: float,
    streams: tuple[int, ...],
    new_tokens: int,
    rounds: int,
    threads: int | None,
    output: Path | None,
) -> None:
    """Measure what drafts gain at given acceptances. Exit code 1 where tokens are not the same."""
    with (
        failing_in_one_line(),
        Engine(bundle, max_batch=max(streams), max_seq=PROMPT_TOKENS + new_tokens, threads=threads) as engine,
    ):
        engine.backend.check_verifies()
        gains = [
            gain
            for count in streams
            for gain in measure(engine, count, acceptance, length=length, cost=cost, tokens=new_tokens, rounds=rounds)
        ]
        document = {
            "format": "starling-synthetic-acceptance",
            "format_version": 1,
            "environment": asdict(describe_environment()),
            "bundle": bundle_document(engine.bundle),
            "run": {"length": length, "cost": cost, "new_tokens": new_tokens, "rounds": rounds},
            "gains": [asdict(gain) for gain in gains],
        }
    write_document(document, output)
    for gain in gains:
        click.echo(
            f"{gain.streams} stream(s), {gain.acceptance:.0%} of drafted tokens right, drafts of {length} that cost "
            f"{cost} steps a token: {gain.tokens_per_second_without:.1f} -> {gain.tokens_per_second_with:.1f} tokens/s "
            f"({gain.gain:.2f}), {'the same' if gain.same_tokens else 'OTHER'} tokens"
        )
    sys.exit(not all(gain.same_tokens for gain in gains))


if __name__ == "__main__":
    command()
