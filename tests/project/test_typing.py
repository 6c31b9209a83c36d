"""What type checkers see of the package, from a program beside a checkout: names, types, and mistakes in keywords."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from starling.engine.generation.sampling_params import SamplingOverrides, SamplingParams

GOOD = """\
import starling
from starling.engine import Engine, SamplingParams

with Engine("bundle", max_seq=2048) as engine:
    text: str = engine.generate("Hello", max_tokens=8, stop=["\\n"], temperature=0.5).text
    texts: list[str] = [result.text for result in engine.generate(["a", "b"], SamplingParams(top_k=3))]
    for chunk in engine.stream("Hello", seed=7):
        print(chunk.text, text, texts, starling.__version__)
    print(engine.chat(system="Be short.").send("Why?", max_tokens=3).text)
"""
BAD = [
    'engine.generate("Hello", max_toknes=8)',
    'engine.stream("Hello", temperature="hot")',
    'engine.chat().send("Hello", top_q=0.5)',
    "engine.nosuch()",
]


def errors_of(folder: Path, program: str) -> list[dict[str, Any]]:
    """The errors of pyright (as basedpyright, which brings its own Node.js) in a program."""
    file = folder / "program.py"
    file.write_text(program)
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson", str(file)]
    document = json.loads(subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False).stdout)
    assert document["summary"]["filesAnalyzed"] == 1
    return [entry for entry in document["generalDiagnostics"] if entry["severity"] == "error"]


def test_a_program_resolves_the_package_and_its_types(tmp_path: Path) -> None:
    assert errors_of(tmp_path, GOOD) == []


@pytest.mark.parametrize("line", BAD)
def test_mistakes_are_found_before_the_program_runs(tmp_path: Path, line: str) -> None:
    found = errors_of(tmp_path, f'from starling.engine import Engine\n\nengine = Engine("bundle")\n{line}\n')
    assert [entry["range"]["start"]["line"] for entry in found] == [3]


def test_the_keywords_are_the_fields_of_the_sampling_settings() -> None:
    assert list(get_type_hints(SamplingOverrides)) == list(get_type_hints(SamplingParams))
