"""What may import what: no cycle, and no arrow that points back; imports inside functions and for types count too."""

from functools import cache
from itertools import pairwise
from pathlib import Path

from document_blocks import ROOT
from grimp import ImportGraph, Layer, build_graph

FOLDERS = ("cli", "engine", "export", "profiling", "serving")
#: Nothing imports from a layer above its own, nor from its neighbours in a layer where those are independent.
LAYERS = (
    Layer("starling.cli"),
    Layer("starling.profiling"),
    Layer("starling.export", "starling.serving"),
    Layer("starling.engine.serving_loop", "starling.engine.pooling_loop"),
    Layer("starling.engine.engine"),
    Layer("starling.engine.loaded_bundle"),
    Layer("starling.engine.chat_session", "starling.engine.draft_bundle"),
    Layer("starling.engine.batching", "starling.engine.pooling"),
    Layer("starling.engine.generation"),
    Layer("starling.engine.text", "starling.engine.verification"),
    Layer("starling.engine.backends"),
    Layer("starling.engine.bundle", "starling.engine.kernels"),
    Layer(
        "starling.engine.divergence",
        "starling.engine.host",
        "starling.engine.installation",
        "starling.engine.onnx_bytes",
        "starling.engine.progress",
        "starling.engine.untrusted_files",
        "starling.engine.whole_files",
    ),
    Layer("starling.engine.cgroup", "starling.engine.file_locks"),
    Layer("starling.engine.errors", "starling.engine.names"),
)


@cache
def graph() -> ImportGraph:
    """All imports within the package."""
    return build_graph("starling", cache_dir=None)


def module(path: Path) -> str:
    """The name of a file's module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(["starling", *parts[: -1 if parts[-1] == "__init__" else None]])


def test_every_module_is_looked_at() -> None:
    files = {module(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert files <= graph().modules


def test_no_module_imports_itself_by_a_detour() -> None:
    imports = graph()
    cycles = {
        " -> ".join([name, *(imports.find_shortest_chain(importer=imported, imported=name) or ())])
        for name in imports.modules
        for imported in imports.find_modules_directly_imported_by(name)
        if imports.chain_exists(importer=imported, imported=name)
    }
    assert not cycles


def test_arrows_point_one_way() -> None:
    found = graph().find_illegal_dependencies_for_layers(LAYERS)
    assert not {f"{wrong.importer} -> {wrong.imported}: {wrong.routes}" for wrong in found}


def test_every_module_of_the_engine_has_its_layer() -> None:
    layers = {name for layer in LAYERS for name in layer.module_tails}
    assert graph().find_children("starling.engine") <= layers


def test_a_file_name_occurs_once() -> None:
    files = [path for folder in (*FOLDERS, "tests") for path in (ROOT / folder).rglob("*.*")]
    given = ("__init__.py", "conftest.py")  # Python's name, and pytest's
    names = sorted(path.name for path in files if path.suffix in (".py", ".cpp", ".h") and path.name not in given)
    assert not {name for name, following in pairwise(names) if name == following}
