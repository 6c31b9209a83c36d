"""No call of transformers may run a checkpoint's own code."""

import ast
from collections.abc import Iterator
from pathlib import Path

from document_blocks import ROOT

#: Methods of transformers' Auto classes that look for code in the folder.
LOADERS = ("from_pretrained", "from_config")


def calls(file: Path) -> Iterator[tuple[int, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
            yield node.lineno, node


def test_every_loader_is_told_to_trust_no_code() -> None:
    found = {
        f"{file.relative_to(ROOT)}:{line}": {keyword.arg: keyword.value for keyword in call.keywords}
        for file in (ROOT / "export").rglob("*.py")
        for line, call in calls(file)
    }
    assert len(found) >= 4
    trusting = [
        place
        for place, keywords in found.items()
        if not (isinstance(said := keywords.get("trust_remote_code"), ast.Constant) and said.value is False)
    ]
    assert not trusting
