"""`starling score`: what a reward model or a classifier gives for texts, or an embedding model's vectors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from starling.cli.shared.options import (
    bundle_argument,
    engine_settings,
    json_option,
    max_batch_option,
    refuse_options,
    scoring_options,
)
from starling.cli.shared.output import note, print_json, read_text
from starling.engine.errors import UserError

if TYPE_CHECKING:
    from starling.engine.engine import Engine
    from starling.engine.pooling.text_pooler import TextInput

#: Lines that are read before they are run: the more, the more of one length run together.
BLOCK = 256
_KINDS = ("text", "messages", "ids")


@click.command()
@bundle_argument
@click.argument("texts", nargs=-1, metavar="[TEXT]...")
@click.option(
    "--input", "source", help="Read texts from a file of JSON lines; - is stdin. A line of JSON answers each."
)
@click.option("--template", help="Chat template by name, for lines with messages.")
@click.option(
    "--truncate",
    type=click.IntRange(-1),
    help="Tokens of a text that are read; -1: as many as the model takes.  [default: the bundle's own, else all]",
)
@click.option("--activation", is_flag=True, help="Probabilities in place of raw scores.")
@max_batch_option(8, "Texts that one run takes at most.")
@scoring_options
@json_option
def command(
    bundle: Path,
    texts: tuple[str, ...],
    source: str | None,
    template: str | None,
    truncate: int | None,
    activation: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Score each TEXT (- reads stdin) by BUNDLE, a reward model or a classifier; the scores are raw ones.

    A line of --input is {"text": …}, {"messages": […]} (a chat, by the bundle's template) or {"ids": […]} (token ids as
    they are), perhaps with an "id"; its answer has that and "scores", by label. A bundle that was exported with
    --task embed gives an "embedding", which is not normalized.

    \b
    Examples:
      starling score starling-rm "[INST] Hello? [/INST] Hi, how can I help you?"
      starling score starling-rm --input answers.jsonl > scores.jsonl
      starling score sentiment "What a fine day." "What a bore." --activation --json
    """
    if bool(texts) == (source is not None):
        raise UserError("give texts, or a file of them with --input")
    if source is not None:
        refuse_options(["as_json"], "is for texts on the command line: --input is answered by lines of JSON")
    elif template is not None:
        raise UserError("--template is for messages: give them as lines of --input")
    options = {"template": template, "truncate": truncate}
    engine_options = engine_settings(settings)
    from starling.engine.bundle.manifest import Bundle
    from starling.engine.engine import Engine

    opened = Bundle.open(bundle, verify=settings["verify"]).require("score", "embed")
    if activation and opened.task != "score":
        raise UserError(f"--activation is for scores, which {bundle} does not give: leave it out")
    lines = None if source is None else _lines(source)
    with Engine(opened, **engine_options, max_batch=settings["max_batch"]) as engine:
        for text in (engine.model.note, engine.model.kernels_note):
            if text is not None:
                note(text)
        if lines is None:
            _print(engine, [read_text(None) if text == "-" else text for text in texts], options, activation, as_json)
            return
        while block := list(islice(lines, BLOCK)):
            answers = _answers(engine, [text for _, text in block], options, activation)
            for (line, _), answer in zip(block, answers, strict=True):
                print_json(({"id": line["id"]} if "id" in line else {}) | answer)


def _answers(
    engine: Engine, texts: Sequence[TextInput], options: dict[str, Any], activation: bool
) -> list[dict[str, Any]]:
    """For each text its numbers by name, and how many tokens it has."""
    from starling.engine.pooling.text_pooler import activated

    pooler = engine.pooler
    prepared = [pooler.prepare(text, **options) for text in texts]
    vectors = pooler.pool(prepared)
    if activation:
        vectors = activated(vectors, pooler.pooling)
    labels = pooler.pooling.labels
    return [
        ({"scores": dict(zip(labels, row, strict=True))} if labels else {"embedding": row}) | {"tokens": text.tokens}
        for row, text in zip(vectors.tolist(), prepared, strict=True)
    ]


def _print(
    engine: Engine, texts: Sequence[TextInput], options: dict[str, Any], activation: bool, as_json: bool
) -> None:
    answers = _answers(engine, texts, options, activation)
    if as_json:
        print_json({"results": answers, "load_ms": engine.load_seconds * 1e3, "provider": engine.model.provider})
        return
    for answer, text in zip(answers, texts, strict=True):
        scores = answer.get("scores")
        if scores is None:
            click.echo(json.dumps(answer["embedding"]))
            continue
        values = "  ".join(
            f"{value:.5f}" if len(scores) == 1 else f"{label} {value:.5f}" for label, value in scores.items()
        )
        click.echo(f"{values}  {_beginning(str(text))}")


def _beginning(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:59]}…"


def _lines(source: str) -> Iterator[tuple[dict[str, Any], TextInput]]:
    """Each line's object and the text in it. Raises UserError naming a line that has none."""
    from starling.serving.batch.input_source import open_source

    with open_source(source) as opened:
        for number, line in enumerate(opened.lines(), 1):
            if line.strip():
                yield _line(f"{opened.name}, line {number}", line)


def _line(where: str, line: bytes) -> tuple[dict[str, Any], TextInput]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is not JSON: give an object with text, messages or ids") from None
    given = [kind for kind in _KINDS if isinstance(found, dict) and kind in found]
    if len(given) != 1:
        raise UserError(f"{where} has {' and '.join(given) or 'no text'}: give one of text, messages and ids")
    text = found[given[0]]
    wanted = str if given[0] == "text" else list
    if not isinstance(text, wanted) or (wanted is list and not text):
        raise UserError(f"{where}: {given[0]} is no {'string' if wanted is str else 'list with something in it'}")
    return found, text
