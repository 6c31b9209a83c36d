"""A program: answers the examples on stdin (JSON) from the bundle named on the command line, one path of the engine.

Which kernels run is for a process to choose, by its environment, before the library is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from example_prompts import Example

from starling.engine import Engine, GenerationResult

#: Tokens of an answer that are looked at.
TOKENS = 16


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer: its tokens as text, and by how much each one's logit was above the next one's."""

    text: str
    pieces: tuple[str, ...]
    margins: tuple[float, ...]

    def margins_of(self, beginning: str) -> tuple[float, ...]:
        """The margins of the tokens that `beginning` is made of; all where the text begins otherwise."""
        length = 0
        for count, piece in enumerate(self.pieces, 1):
            length += len(piece)
            if length >= len(beginning):
                return self.margins[:count]
        return self.margins


def answers(bundle: Path, examples: Sequence[Example], env: Mapping[str, str]) -> list[Answer]:
    """The answers to `examples`, from a process of its own with the variables `env`."""
    finished = subprocess.run(
        [sys.executable, __file__, str(bundle)],
        input=json.dumps([asdict(example) for example in examples]),
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return [Answer(one["text"], tuple(one["pieces"]), tuple(one["margins"])) for one in json.loads(finished.stdout)]


def _answer(engine: Engine, example: Example) -> Answer:
    if not example.chat:
        return _read(engine, engine.generate(example.prompt, max_tokens=TOKENS, logprobs=2))
    chat = engine.chat(system=example.system)
    for turn in example.before:
        chat.send(turn, max_tokens=64)
    return _read(engine, chat.send(example.prompt, max_tokens=TOKENS, logprobs=2))


def _read(engine: Engine, result: GenerationResult) -> Answer:
    assert result.logprobs is not None
    margins = [first[1] - second[1] for first, second in (entry.top for entry in result.logprobs)]
    pieces = [engine.tokenizer.decode([token]) for token in result.tokens]
    return Answer(result.text, tuple(pieces), tuple(margins))


def _main() -> None:
    examples = [Example(**{**given, "before": tuple(given["before"])}) for given in json.load(sys.stdin)]
    with Engine(sys.argv[1], max_seq=512) as engine:
        found: list[dict[str, Any]] = [asdict(_answer(engine, example)) for example in examples]
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    _main()
