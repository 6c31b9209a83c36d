"""What the documents and help texts suggest to type is answered rightly, and not by a near-tie that rounding turns.

Each example is answered on every path that a processor may take: fp32, int8 and int4, with the kernels of either
instruction set and without them. A new example needs an entry in KNOWN.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from example_answers import Answer, answers
from example_prompts import Example, documented_examples

from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization

QUESTION = "What is the capital of South Korea?"
#: The least by which a token of a beginning leads, in logits, on fp32 and int8: the kernels of int8 differ by 0.4.
WIDE = 0.75
KERNELS = {
    "kernels": {},
    "AVX2 kernels": {"STARLING_CPU_ISA": "avx2"},
    "no kernels": {"STARLING_CPU_KERNELS": "0"},
}


@dataclass(frozen=True, slots=True)
class Known:
    """What the answer begins with on fp32 and int8, word for word, and what it says on int4 as well."""

    beginning: str
    content: str


KNOWN = {
    Example(QUESTION): Known("The capital of South Korea is Seoul.", "Seoul"),
    Example("And of Japan?", before=(QUESTION,)): Known("The capital of Japan is Tokyo.", "Tokyo"),
    Example("What is the capital of Japan?"): Known("The capital of Japan is Tokyo", "Tokyo"),
    Example("What is the capital of France, and what is it known for?"): Known(
        "The capital of France is Paris", "Paris"
    ),
    Example("What is Python, in one sentence?"): Known("Python is a", "language"),
    Example("The capital of France is", chat=False): Known(" Paris.", "Paris"),
    Example("The largest city in Japan is", chat=False): Known(" Tokyo, with a population of", "Tokyo"),
}
#: What docs/triton.md sends with fields that are refused.
REFUSED = Example("Hi", chat=False)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """The documents' examples, all of them known."""
    documented = documented_examples()
    unknown = {example: places for example, places in documented.items() if example not in {*KNOWN, REFUSED}}
    assert not unknown, f"examples that KNOWN has no answer for: {unknown}"
    return [example for example in documented if example != REFUSED]


@pytest.fixture(scope="module")
def demo_int4_bundle(demo_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2, weight-only INT4, as `--no-check` leaves it."""
    out = tmp_path_factory.mktemp("int4") / "bundle"
    export_bundle(demo_checkpoint, out, ExportOptions(quantization=BlockQuantization("int4"), check=False))
    return out


def test_the_documents_have_examples(examples: list[Example]) -> None:
    assert {Example(QUESTION), Example("The largest city in Japan is", chat=False)} <= set(examples)


def test_on_fp32_and_int8_an_answer_begins_rightly_and_by_a_wide_margin_whatever_the_kernels(
    demo_bundle: Path, demo_int8_bundle: Path, examples: list[Example]
) -> None:
    ran = {"fp32": answers(demo_bundle, examples, {})}
    ran |= {f"int8, {name}": answers(demo_int8_bundle, examples, env) for name, env in KERNELS.items()}
    for number, example in enumerate(examples):
        beginning = KNOWN[example].beginning
        of_paths = {path: given[number] for path, given in ran.items()}
        for path, answer in of_paths.items():
            assert answer.text.startswith(beginning), (example, path, answer.text)
            assert min(answer.margins_of(beginning)) >= WIDE, (example, path, answer.margins)
        _check_spread(example, beginning, list(of_paths.values()))


def _check_spread(example: Example, beginning: str, given: list[Answer]) -> None:
    """What the paths make of a token's margin differs by less than half of the smallest."""
    for margins in zip(*(answer.margins_of(beginning) for answer in given), strict=True):
        assert max(margins) - min(margins) < min(margins) / 2, (example, margins)


@pytest.mark.parametrize("kernels", ["kernels", "no kernels"])
def test_int4_which_rounds_this_model_badly_still_says_what_is_right(
    demo_int4_bundle: Path, examples: list[Example], kernels: str
) -> None:
    for example, answer in zip(examples, answers(demo_int4_bundle, examples, KERNELS[kernels]), strict=True):
        assert KNOWN[example].content in answer.text, (example, answer.text)
