"""The README's table of quality, size and speed per precision, from results that are kept.

    python -m starling.profiling.quality.precision_table profiling/results/precision

The folder has NAME.evaluate.json (of `starling evaluate --output`) and NAME.profile.json (of `starling profile
--output`) for each precision; the table has a line for each, the largest bundle first, in markdown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starling.engine.errors import UserError
from starling.profiling.reports.profile_document import read_profile

Document = Mapping[str, Any]

EVALUATION, PROFILE = ".evaluate.json", ".profile.json"
HEADINGS = ("bundle", "size", "mean KL (nats)", "max KL", "top-1 agreement", "perplexity", "TTFT ms", "decode tok/s")


def read_results(folder: Path) -> list[tuple[str, Document, Document]]:
    """(name, evaluation, profile) of each precision in the folder. Raises UserError where one of the two is missing."""
    names = sorted(file.name.removesuffix(EVALUATION) for file in folder.glob(f"*{EVALUATION}"))
    if not names:
        raise UserError(f"{folder} has no file *{EVALUATION}: write one with starling evaluate BUNDLE --output")
    return [(name, _read(folder / f"{name}{EVALUATION}"), read_profile(folder / f"{name}{PROFILE}")) for name in names]


def markdown_table(results: Sequence[tuple[str, Document, Document]]) -> str:
    """The table; speeds are of the profile's first point."""
    largest_first = sorted(results, key=lambda result: -result[1]["bundle"]["bytes"])
    lines = [_line(HEADINGS), _line(["---"] * len(HEADINGS))]
    return "\n".join([*lines, *(_line(_cells(*result)) for result in largest_first)])


def _cells(name: str, evaluation: Document, profile: Document) -> list[str]:
    measured, far = profile["measurements"][0], evaluation["divergence"]
    compared = (
        ["", "", ""] if far is None else [_kl(far["mean_kl"]), _kl(far["max_kl"]), f"{far['top1_agreement']:.1%}"]
    )
    return [
        name,
        f"{evaluation['bundle']['bytes'] / 1e6:.0f} MB",
        *compared,
        f"{evaluation['perplexity']:.2f}",
        f"{measured['time_to_first_token_ms']['p50']:.0f}",
        f"{measured['output_tokens_per_second']['per_row']:.1f}",
    ]


def _kl(value: float) -> str:
    return f"{value:.2g}" if value else "0"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _read(file: Path) -> Document:
    try:
        document: Document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); write it with starling evaluate --output") from error
    return document


if __name__ == "__main__":
    print(markdown_table(read_results(Path(sys.argv[1]))))
