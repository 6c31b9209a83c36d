"""No module under serving/ looks into an exception's words: what it needs to know is in the exception's attributes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from document_blocks import ROOT

MODULES = sorted((ROOT / "serving").rglob("*.py"))
ERRORS = ("Error", "Exception", "Failed", "Exceeded")
#: Attributes that are a message or hold one.
WORDS = frozenset({"args", "client_message", "logged", "message", "problem"})
#: Methods that look into a text, of str and of a regular expression.
STRING_METHODS = frozenset(
    {
        *("count", "endswith", "find", "index", "partition", "removeprefix", "removesuffix", "replace", "rfind"),
        *("rindex", "rpartition", "rsplit", "split", "splitlines", "startswith", "translate"),
    }
)
PATTERN_METHODS = frozenset({"findall", "finditer", "fullmatch", "match", "search", "split", "sub", "subn"})


def inspections(source: str) -> list[int]:
    """The lines that look into the words of an exception."""
    return [line for scope in _scopes(ast.parse(source)) for line in _inspected(scope)]


def _scopes(tree: ast.Module | ast.ClassDef) -> Iterator[ast.stmt]:
    """Statements of the module and of its classes; a function is one."""
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef):
            yield from _scopes(statement)
        else:
            yield statement


def _inspected(scope: ast.stmt) -> list[int]:
    errors = set(_errors(scope))
    texts: set[str] = set()
    while found := {name for name, value in _assigned(scope) if _mentions(value, errors, texts)} - texts:
        texts |= found
    return [node.lineno for node in ast.walk(scope) if isinstance(node, ast.expr) and _inspects(node, errors, texts)]


def _errors(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.name is not None:
            yield node.name
        if isinstance(node, ast.arg) and node.annotation is not None:
            names = [name.id for name in ast.walk(node.annotation) if isinstance(name, ast.Name)]
            if any(name.endswith(ERRORS) for name in names):
                yield node.arg


def _assigned(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, ast.NamedExpr | ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value


def _mentions(node: ast.AST, errors: set[str], texts: set[str]) -> bool:
    """Whether an expression has the words of an exception in it."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and part.attr in WORDS:
            return True
        if isinstance(part, ast.Name) and part.id in texts:
            return True
        shown = part.value if isinstance(part, ast.FormattedValue) else None
        if isinstance(part, ast.Call) and isinstance(part.func, ast.Name) and part.func.id in ("str", "repr"):
            shown = part.args[0] if part.args else None
        if isinstance(shown, ast.Name) and shown.id in errors:
            return True
    return False


def _inspects(node: ast.expr, errors: set[str], texts: set[str]) -> bool:
    looked_at: list[ast.expr] = []
    if isinstance(node, ast.Compare) and not any(isinstance(test, ast.Is | ast.IsNot) for test in node.ops):
        looked_at = [node.left, *node.comparators]
    elif isinstance(node, ast.Subscript):
        looked_at = [node.value]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in STRING_METHODS:
            looked_at = [node.func.value]
        if node.func.attr in PATTERN_METHODS:
            looked_at += node.args
    return any(_mentions(part, errors, texts) for part in looked_at)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_one_looks_into_the_words_of_an_exception(path: Path) -> None:
    assert not inspections(path.read_text())


@pytest.mark.parametrize(
    "statement",
    [
        'field = str(error).partition(" ")[0]',
        'code = "long" if "KV cache" in str(error) else None',
        'text = f"{error}"\n    cut = text.split(":")',
        'refusal.message = refusal.message.replace("a", "b")',
        'found = re.match("[a-z]+", str(error))',
        "first = error.args[0]",
        'same = error.problem == "x"',
    ],
)
def test_looking_into_the_words_is_found(statement: str) -> None:
    assert inspections(f"try:\n    pass\nexcept ValueError as error:\n    {statement}\n")


def test_handing_the_words_on_is_none() -> None:
    assert not inspections("try:\n    pass\nexcept ValueError as error:\n    raise Other(f'x: {error}', str(error))\n")
