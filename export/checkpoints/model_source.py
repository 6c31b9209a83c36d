"""Where MODEL of `starling export` is, looked at before PyTorch is loaded, which takes seconds; and opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from starling.engine.errors import CheckpointError
from starling.export.checkpoints.random_models import RANDOM_PREFIX, check_random

if TYPE_CHECKING:
    from starling.export.checkpoints.checkpoint import Checkpoint
    from starling.export.checkpoints.gguf_file import GgufFile

_HUB_ALPHABET = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A checkpoint's `kind` and `name`, and where it is: a folder, a GGUF file with its header read, or nowhere."""

    kind: str
    name: str
    folder: Path | None = None
    gguf: GgufFile | None = None


def find_model(
    model: str, *, revision: str | None = None, fetching: Callable[[str], None] = lambda text: None
) -> FoundModel:
    """Find MODEL: a folder, a `.gguf` file, `demo`, `random:NAME`, or a hub id `org/name` (at `revision`).

    What is not on this machine is fetched; `fetching` is called then. Files are checked as far as it goes without
    PyTorch: what is missing, truncated, or of a kind that cannot be exported.
    Raises CheckpointError, UnsupportedModelError and HubError as `open_checkpoint` does.
    """
    path = Path(model).expanduser()
    is_hub = _is_hub_id(model) and not path.exists()
    if revision is not None and not is_hub:
        raise CheckpointError(f"--revision {revision} is for a hub id, which {model!r} is not: leave it out")
    if model.startswith(RANDOM_PREFIX):
        return _random(model.removeprefix(RANDOM_PREFIX))
    if model == "demo":
        return _demo(lambda: fetching(f"fetching {model}"))
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.exists():  # the package gguf takes a second to load
            raise CheckpointError(f"{model} cannot be read: No such file; give the path of a .gguf file")
        from starling.export.checkpoints.gguf_parts import gguf_name, open_gguf

        return FoundModel("gguf", gguf_name(path), gguf=open_gguf(path))
    if path.is_dir():
        return _folder(path, "huggingface", path.resolve().name)
    if is_hub:
        from starling.export.checkpoints.hub import download

        fetching(f"fetching {model}")
        return _folder(download(model, revision), "hub", model)
    if path.is_file():
        raise CheckpointError(f"{model} is a file, but no .gguf file: give the folder that holds the whole checkpoint")
    raise CheckpointError(
        f"{model!r} is no model: give a Hugging Face folder, a .gguf file, 'demo', 'random:starling-7b' or a hub id "
        "such as 'org/name'"
    )


def _random(name: str) -> FoundModel:
    from starling.export.tokenizers.starling_tokenizer import mistral_model_file

    check_random(name)
    mistral_model_file()
    return FoundModel("random", name)


def _demo(before_fetch: Callable[[], None]) -> FoundModel:
    from starling.export.checkpoints.demo_model import DEMO_NAME, demo_gguf
    from starling.export.checkpoints.gguf_parts import open_gguf

    return FoundModel("gguf", DEMO_NAME, gguf=open_gguf(demo_gguf(before_fetch)))


def _folder(folder: Path, kind: str, name: str) -> FoundModel:
    from starling.engine.names import EXTRA_TEMPLATES
    from starling.export.checkpoints.checkpoint import FILES
    from starling.export.checkpoints.huggingface import check_folder, check_no_adapter

    FILES.check_folder(folder, chain(folder.iterdir(), (folder / EXTRA_TEMPLATES).glob("*")))
    check_no_adapter(folder)
    if not (folder / "config.json").exists():
        if (folder / "bundle.json").is_file():
            raise CheckpointError(f"{folder} is a bundle, which an export has made: give the checkpoint itself")
        if files := sorted(folder.glob("*.gguf")):
            raise CheckpointError(f"{folder} has no config.json, but {files[0].name}: give that file, {files[0]}")
    check_folder(folder)
    return FoundModel(kind, name, folder=folder)


def _is_hub_id(model: str) -> bool:
    parts = model.split("/")
    allowed = all(part and set(part) <= _HUB_ALPHABET and part.strip(".") for part in parts)
    return len(parts) == 2 and allowed


def open_checkpoint(model: str | FoundModel, *, revision: str | None = None) -> Checkpoint:
    """Open MODEL, what `find_model` takes or gave: every header is checked before anything is traced.

    Raises CheckpointError (not a checkpoint, or broken), UnsupportedModelError (an architecture that cannot be read),
    HubError (the hub or the package index could not be reached, or refused).
    """
    # The readers are imported where they are used: each brings its own heavy packages.
    found = find_model(model, revision=revision) if isinstance(model, str) else model
    if found.gguf is not None:
        from starling.export.checkpoints.gguf_checkpoint import open_gguf_checkpoint

        return open_gguf_checkpoint(found.gguf, name=found.name)
    if found.folder is not None:
        from starling.export.checkpoints.huggingface import open_folder

        return open_folder(found.folder, kind=found.kind, name=found.name)
    from starling.export.checkpoints.random_checkpoint import open_random

    return open_random(found.name)
