"""What speculation gains on text that repeats its prompt, and loses on text that does not.

    python -m starling.profiling.load.speculation_gain BUNDLE --output profiling/results/speculation.json

Twenty prompts are answered with and without, taking turns on one engine, and the tokens are compared. Where a kernel
rounds a run of several tokens otherwise than a run of one (ONNX Runtime's own int8 products do), two tokens that are
nearly as likely may change places: such answers are counted, and the place of their first difference is given.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

from starling.engine.engine import Engine
from starling.engine.errors import UserError
from starling.engine.generation.results import GenerationResult
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.names import Speculation
from starling.profiling.machine.environment import describe_environment
from starling.profiling.programs import failing_in_one_line, write_document
from starling.profiling.reports.profile_document import bundle_document

METHOD: Speculation = "prompt-lookup"
KINDS = ("repetitive", "free")
PROMPTS = "texts/speculation.toml"
WARM_UP_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt; `kind` is one of KINDS."""

    kind: str
    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt answered both ways, figures as medians over the rounds. Decode speeds in tokens/s, latencies in ms.

    `first_difference` is the index of the first token that differs, None where all are the same. `gain` is the ratio of
    the decode speeds, `latency_gain` that of the request latencies, prefill included: above 1 speculation is faster.
    """

    kind: str
    name: str
    prompt_tokens: int
    new_tokens: int
    first_difference: int | None
    drafted_tokens: int
    accepted_tokens: int
    speed_without: float
    speed_with: float
    gain: float
    latency_without_ms: float
    latency_with_ms: float
    latency_gain: float


@dataclass(frozen=True, slots=True)
class Summary:
    """All answers of a kind: how many had the same tokens, and the gains' geometric mean, least and greatest."""

    kind: str
    prompts: int
    identical: int
    acceptance: float
    gain: float
    least_gain: float
    greatest_gain: float
    latency_gain: float


def read_texts() -> list[Text]:
    """The built-in prompts: ten of each kind."""
    file = resources.files("starling.profiling.load").joinpath(PROMPTS)
    listed = tomllib.loads(file.read_text(encoding="utf-8"))["prompts"]
    return [Text(entry["kind"], entry["name"], entry["text"].strip()) for entry in listed]


def measure(
    engine: Engine,
    texts: Sequence[Text],
    params: SamplingParams,
    rounds: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Answer]:
    """Answer every text `rounds` times both ways, the two taking turns in going first.

    Raises BackendError where the engine cannot speculate.
    """
    prompts = [prompt_ids(engine, text.text) for text in texts]
    _both(engine, prompts[0], SamplingParams(max_tokens=WARM_UP_TOKENS), 0)
    runs: list[list[tuple[GenerationResult, GenerationResult]]] = [[] for _ in texts]
    for number in range(rounds):
        for text, prompt, done in zip(texts, prompts, runs, strict=True):
            progress(f"round {number + 1} of {rounds}: {text.name}")
            done.append(_both(engine, prompt, params, number))
    return [_answer(text, done) for text, done in zip(texts, runs, strict=True)]


def summarize(answers: Iterable[Answer]) -> list[Summary]:
    """One summary for each kind that has answers."""
    by_kind = {kind: [answer for answer in answers if answer.kind == kind] for kind in KINDS}
    return [_summary(kind, chosen) for kind, chosen in by_kind.items() if chosen]


def report(engine: Engine, params: SamplingParams, rounds: int, answers: list[Answer]) -> dict[str, Any]:
    """The JSON document; fields as of Answer and Summary."""
    return {
        "format": "starling-speculation",
        "format_version": 1,
        "environment": asdict(describe_environment()),
        "bundle": bundle_document(engine.bundle),
        "run": {
            "speculation": METHOD,
            "provider": engine.backend.provider,
            "rounds": rounds,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "seed": params.seed,
        },
        "summaries": [asdict(summary) for summary in summarize(answers)],
        "answers": [asdict(answer) for answer in answers],
    }


def prompt_ids(engine: Engine, text: str) -> list[int]:
    """A text as the user turn of a chat, or as it is where the bundle has no chat template."""
    if engine.chat_templates.names:
        return engine.apply_chat_template([{"role": "user", "content": text}])
    return engine.tokenizer.encode(text)


def _both(
    engine: Engine, prompt: list[int], params: SamplingParams, number: int
) -> tuple[GenerationResult, GenerationResult]:
    """The answer without speculation and the one with it; which is made first alternates with `number`."""
    results: dict[str | None, GenerationResult] = {}
    for method in (None, METHOD) if number % 2 == 0 else (METHOD, None):
        engine.speculation = method
        results[method] = engine.generate(prompt, params, reply=True)
    return results[None], results[METHOD]


def _answer(text: Text, runs: list[tuple[GenerationResult, GenerationResult]]) -> Answer:
    plain, drafted = runs[0]
    differences = [at for pair in runs if (at := _difference(*pair)) is not None]
    speeds = [median(pair[which].timings.tokens_per_second for pair in runs) for which in (0, 1)]
    latencies = [median(pair[which].timings.total_s * 1e3 for pair in runs) for which in (0, 1)]
    return Answer(
        kind=text.kind,
        name=text.name,
        prompt_tokens=len(plain.prompt_tokens),
        new_tokens=len(plain.tokens),
        first_difference=min(differences, default=None),
        drafted_tokens=drafted.timings.drafted_tokens,
        accepted_tokens=drafted.timings.accepted_tokens,
        speed_without=speeds[0],
        speed_with=speeds[1],
        gain=speeds[1] / speeds[0],
        latency_without_ms=latencies[0],
        latency_with_ms=latencies[1],
        latency_gain=latencies[0] / latencies[1],
    )


def _difference(plain: GenerationResult, drafted: GenerationResult) -> int | None:
    """Index of the first token that is not the same in both, or that one of them lacks."""
    for at, (a, b) in enumerate(zip(plain.tokens, drafted.tokens, strict=False)):
        if a != b:
            return at
    lengths = len(plain.tokens), len(drafted.tokens)
    return None if lengths[0] == lengths[1] else min(lengths)


def _summary(kind: str, answers: list[Answer]) -> Summary:
    gains = [answer.gain for answer in answers]
    drafted = sum(answer.drafted_tokens for answer in answers)
    return Summary(
        kind=kind,
        prompts=len(answers),
        identical=sum(answer.first_difference is None for answer in answers),
        acceptance=sum(answer.accepted_tokens for answer in answers) / drafted if drafted else 0.0,
        gain=geometric_mean(gains),
        least_gain=min(gains),
        greatest_gain=max(gains),
        latency_gain=geometric_mean(answer.latency_gain for answer in answers),
    )


def tables(document: dict[str, Any]) -> list[Table]:
    """The document for people: a line for each answer, then one for each kind."""
    answers = Table(box=box.SIMPLE_HEAD)
    for heading in ("prompt", "tokens", "same", "accepted", "tok/s without", "with", "gain"):
        answers.add_column(heading, justify="left" if heading == "prompt" else "right")
    for answer in document["answers"]:
        same = "yes" if answer["first_difference"] is None else f"up to {answer['first_difference']}"
        accepted = f"{answer['accepted_tokens']}/{answer['drafted_tokens']}"
        speeds = (f"{answer[f'speed_{how}']:.1f}" for how in ("without", "with"))
        answers.add_row(answer["name"], str(answer["new_tokens"]), same, accepted, *speeds, f"{answer['gain']:.2f}")
    kinds = Table(box=box.SIMPLE_HEAD)
    for heading in ("kind", "same tokens", "acceptance", "decode gain", "from … to", "request latency gain"):
        kinds.add_column(heading, justify="left" if heading == "kind" else "right")
    for each in document["summaries"]:
        kinds.add_row(
            each["kind"],
            f"{each['identical']} of {each['prompts']}",
            f"{each['acceptance']:.0%}",
            f"{each['gain']:.2f}",
            f"{each['least_gain']:.2f} … {each['greatest_gain']:.2f}",
            f"{each['latency_gain']:.2f}",
        )
    return [answers, kinds]


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--new-tokens", type=click.IntRange(2), default=128, help="The most tokens of an answer.")
@click.option("--rounds", type=click.IntRange(1), default=3, help="Times that every prompt is answered both ways.")
@click.option("--temperature", type=float, default=0.0, help="0 is greedy; above, tokens are drawn with seed 7.")
@click.option("--threads", type=click.IntRange(1), help="Threads of the CPU backend.  [default: physical cores]")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the JSON document here too.")
def command(
    bundle: Path, new_tokens: int, rounds: int, temperature: float, threads: int | None, output: Path | None
) -> None:
    """Answer twenty prompts with and without prompt-lookup speculation; compare tokens and speed.

    Exit code 1 where an answer's tokens are not the same.
    """
    with failing_in_one_line():
        if output is not None and not output.absolute().parent.is_dir():  # found out now rather than after minutes
            raise UserError(f"{output.parent} is no folder; choose another --output")
        params = SamplingParams(max_tokens=new_tokens, temperature=temperature, seed=7 if temperature else None)
        with Engine(bundle, threads=threads, speculation=METHOD) as engine:
            document = report(engine, params, rounds, measure(engine, read_texts(), params, rounds, _show))
    write_document(document, output)
    console = Console()
    for table in tables(document):  # off a terminal rich assumes 80 columns and would fold the names
        Console(width=None if console.is_terminal else 120).print(table)
    sys.exit(any(answer["first_difference"] is not None for answer in document["answers"]))


def _show(text: str) -> None:
    """Say on a terminal's last line what is being measured."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text} …", nl=False, err=True)


if __name__ == "__main__":
    command()
