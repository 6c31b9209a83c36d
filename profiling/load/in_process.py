"""Load on a serving loop: many streams against one, and what running streams feel of a long prompt's prefill.

    python -m starling.profiling.load.in_process BUNDLE [--streams 8] [--json]

Prompts are real sentences, decoding is greedy and goes on after end tokens. One stream at a time and all at once take
turns, so that a machine's drift meets both; the ratios are of the rounds' medians.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import click

from starling.engine.batching.request import RequestHandle
from starling.engine.engine import Engine
from starling.engine.errors import StarlingError
from starling.engine.generation.results import GenerationChunk, GenerationResult
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.serving_loop import ServingLoop
from starling.profiling.distribution import distribution
from starling.profiling.exact_prompts import prompt_tokens
from starling.profiling.programs import failing_in_one_line


@dataclass(frozen=True, slots=True)
class Load:
    """Some streams at once; times in ms. Tokens per second are of all, from the first request to the last token."""

    streams: int
    tokens_per_second: float
    ttft_p50_ms: float
    ttft_p95_ms: float
    itl_p50_ms: float
    itl_p95_ms: float


@dataclass(frozen=True, slots=True)
class Interference:
    """Inter-token latencies of running streams before and while a long prompt is prefilled, in ms."""

    streams: int
    prompt_tokens: int
    quiet_p50_ms: float
    quiet_p95_ms: float
    prefill_p50_ms: float
    prefill_p95_ms: float
    #: Time to first token of the long prompt beside the streams, and without any.
    ttft_ms: float
    ttft_alone_ms: float

    @property
    def ratio(self) -> float:
        """How many times its quiet value the p95 is."""
        return self.prefill_p95_ms / self.quiet_p95_ms


def measure_load(loop: ServingLoop, prompts: list[list[int]], new_tokens: int, streams: int) -> Load:
    """Run all prompts with `streams` of them at a time: a client takes the next as soon as its last one is done.

    Raises what a request failed with.
    """

    def answer(prompt: list[int]) -> GenerationResult:
        return loop.submit(prompt, _params(new_tokens)).result()

    with ThreadPoolExecutor(streams) as clients:
        begin = perf_counter()
        results = list(clients.map(answer, prompts))
        seconds = perf_counter() - begin
    ttft = distribution(result.timings.ttft_ms for result in results)
    itl = distribution(gap * 1e3 for result in results for gap in result.timings.itl_s)
    tokens = sum(len(result.tokens) for result in results)
    return Load(streams, tokens / seconds, ttft.p50, ttft.p95, itl.p50, itl.p95)


class _Stream:
    """A running request and the moments of its tokens."""

    def __init__(self, loop: ServingLoop, prompt: list[int], new_tokens: int) -> None:
        self.moments: list[float] = []
        self.handle: RequestHandle = loop.submit(prompt, _params(new_tokens), on_chunk=self._note)

    def _note(self, chunk: GenerationChunk) -> None:
        self.moments.append(perf_counter())

    def wait(self, tokens: int) -> None:
        """Until so many tokens have come. Raises what the request failed with, StarlingError where it ended early."""
        while len(self.moments) < tokens:
            if self.handle.done:
                reason = self.handle.result().finish_reason
                raise StarlingError(f"a stream ended ({reason}) after {len(self.moments)} tokens, before {tokens}")
            sleep(0.002)

    def gaps(self, begin: float, end: float) -> list[float]:
        """Times between tokens that came within the two moments, in ms."""
        moments = [moment for moment in self.moments if begin <= moment <= end]
        return [(later - earlier) * 1e3 for earlier, later in pairwise(moments)]


def measure_interference(
    loop: ServingLoop, prompts: list[list[int]], long: list[int], *, quiet_tokens: int, alone_ms: float
) -> Interference:
    """Streams of `prompts` decode; after `quiet_tokens` tokens of the last one the long prompt comes."""
    streams = [_Stream(loop, prompt, loop.engine.max_seq - len(prompt)) for prompt in prompts]
    streams[-1].wait(1)
    quiet_begin = perf_counter()
    streams[-1].wait(quiet_tokens)
    begin = perf_counter()
    timings = loop.submit(long, _params(1)).result().timings
    end = perf_counter()
    for stream in streams:
        stream.handle.cancel()
    for stream in streams:
        stream.handle.result()
    quiet = distribution(gap for stream in streams for gap in stream.gaps(quiet_begin, begin))
    busy = distribution(gap for stream in streams for gap in stream.gaps(begin, end))
    return Interference(len(prompts), len(long), quiet.p50, quiet.p95, busy.p50, busy.p95, timings.ttft_ms, alone_ms)


def _params(new_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=new_tokens, ignore_eos=True)


def _median_load(loads: list[Load]) -> Load:
    rows = [asdict(load) for load in loads]
    return Load(**{name: median(row[name] for row in rows) for name in rows[0]})


def report(bundle: Path, options: dict[str, Any]) -> dict[str, Any]:
    """All measurements as one document."""
    streams, new_tokens, length = options["streams"], options["new_tokens"], options["prompt_tokens"]
    longest = options["long_prompt"]
    with (
        Engine(bundle, max_seq=longest + 512, max_batch=streams, threads=options["threads"]) as engine,
        # No known prefixes: the long prompt, which comes several times, is to be prefilled each time.
        ServingLoop(
            engine, prefill_chunk=options["prefill_chunk"], slowdown=options["slowdown"], prefix_cache=0
        ) as loop,
    ):
        prompts = [prompt_tokens(engine.tokenizer, length, number) for number in range(streams)]
        long = prompt_tokens(engine.tokenizer, longest, streams)
        loop.submit(prompts[0], _params(4)).result()
        single, together = list[Load](), list[Load]()
        for _ in range(options["rounds"]):
            single.append(measure_load(loop, prompts, new_tokens, 1))
            # Each client comes back: the figure is of a server at work, not of its filling up and running dry.
            together.append(measure_load(loop, prompts * options["turns"], new_tokens, streams))
        alone = loop.submit(long, _params(1)).result().timings.ttft_ms
        interference = [
            measure_interference(loop, prompts[:count], long, quiet_tokens=40, alone_ms=alone)
            for _ in range(options["rounds"])
            for count in (1, streams - 1)
            if count > 0
        ]
    one, many = _median_load(single), _median_load(together)
    return {
        "settings": {**options, "bundle": bundle.name},
        "one": asdict(one),
        "many": asdict(many),
        "ratios": {name: value / asdict(one)[name] for name, value in asdict(many).items() if name != "streams"},
        "rounds": {"one": [asdict(load) for load in single], "many": [asdict(load) for load in together]},
        "prefill_beside": [{**asdict(each), "p95_ratio": each.ratio} for each in interference],
    }


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--streams", type=click.IntRange(1), default=8, show_default=True, help="Requests at once, and rows.")
@click.option("--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, help="Of each stream.")
@click.option("--new-tokens", type=click.IntRange(2), default=128, show_default=True, help="Of each stream.")
@click.option("--long-prompt", type=click.IntRange(1), default=1024, show_default=True, help="Tokens of the long one.")
@click.option("--turns", type=click.IntRange(1), default=3, show_default=True, help="Requests of each of the streams.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Rounds of one and of many.")
@click.option("--prefill-chunk", type=click.IntRange(1), default=128, show_default=True, help="As of ServingLoop.")
@click.option("--slowdown", type=float, help="As of ServingLoop.  [default: its own]")
@click.option("--threads", type=click.IntRange(1), help="Threads of the CPU backend.  [default: physical cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the document with every round instead.")
def command(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure many streams against one on a serving loop, and what running streams feel of a long prompt."""
    with failing_in_one_line():
        document = report(bundle, options)
    click.echo(json.dumps(document, indent=2) if as_json else "\n".join(_lines(document)))


def _lines(document: dict[str, Any]) -> list[str]:
    one, many, ratios = document["one"], document["many"], document["ratios"]
    lines = [f"{'':18}{'1 stream':>12}{str(many['streams']) + ' streams':>12}{'ratio':>8}"]
    lines += [f"{name:18}{one[name]:12.1f}{many[name]:12.1f}{ratio:8.2f}" for name, ratio in ratios.items()]
    for each in document["prefill_beside"]:
        lines.append(
            f"{each['streams']} running while {each['prompt_tokens']} tokens prefill: ITL p50/p95 "
            f"{each['quiet_p50_ms']:.1f}/{each['quiet_p95_ms']:.1f} -> {each['prefill_p50_ms']:.1f}/"
            f"{each['prefill_p95_ms']:.1f} ms, p95 x {each['p95_ratio']:.2f}; its TTFT {each['ttft_ms']:.0f} ms, "
            f"alone {each['ttft_alone_ms']:.0f}"
        )
    return lines


if __name__ == "__main__":
    command()
