"""docs/models.md: the table of what the sweep over transformers' model types found."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_HEAD = """# Models

Every decoder language model of the installed transformers, as a tiny random model, exported in the dialect `ort` and
run by ONNX Runtime on a CPU: a prefill, a chunk after it and decode steps, against PyTorch's logits in float32. The
table is written by `python tests/helpers/model_sweep.py [MODEL_TYPE …]`. What is refused is refused at the export, by
name.

"""
_WORDS = {
    "right": "right",
    "wrong": "**wrong**",
    "refused": "refused",
    "crash": "**crash**",
    "no-model": "not tried",
    "timeout": "not tried",
}
_LINE = re.compile(r"^\| `([^`]+)` \| ([^|]+) \| (.*) \|$", re.MULTILINE)


def read_page(page: Path) -> dict[str, tuple[str, str]]:
    """(verdict, why) by model type; empty where there is no page yet."""
    if not page.exists():
        return {}
    verdicts = {word: verdict for verdict, word in reversed(_WORDS.items())}
    return {
        name: (verdicts[word.strip()], why.strip())
        for name, word, why in _LINE.findall(page.read_text(encoding="utf-8"))
    }


def write_page(page: Path, lines: dict[str, tuple[str, str]]) -> None:
    """The page anew; figures of a right one stay out of it, so that it changes only with what is true."""
    counts = {word: 0 for word in dict.fromkeys(_WORDS.values())}
    for verdict, _ in lines.values():
        counts[_WORDS[verdict]] += 1
    summary = ", ".join(f"{count} {word}" for word, count in counts.items())
    rows = [
        f"| `{name}` | {_WORDS[verdict]} | {'' if verdict == 'right' else why.replace('|', '/')} |"
        for name, (verdict, why) in lines.items()
    ]
    table = "\n".join(["| model type | export | why |", "|---|---|---|", *rows])
    page.write_text(f"{_HEAD}{len(lines)} types: {summary}.\n\n{table}\n", encoding="utf-8")
