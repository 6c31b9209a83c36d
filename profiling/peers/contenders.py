"""Who takes part in a comparison: each runtime with each model, and the process that runs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling.engine.bundle import Bundle
from starling.engine.errors import UserError
from starling.profiling.peers.precision import decoder_path, graph_precision
from starling.profiling.peers.process import WorkerProcess

OURS = "starling"


@dataclass(frozen=True, slots=True)
class Contender:
    """One runtime with one model: `module` is its worker module in this folder, `graph` the ONNX file it runs."""

    name: str
    python: str
    module: str
    folder: Path
    graph: Path


def contenders(bundle: Bundle, peer_python: str, peer_models: Sequence[Path], bundle_in_peer: bool) -> list[Contender]:
    """Ours first, then the peer with each of its models, then the peer with our bundle.

    Raises UserError where a folder of the peer has no usable genai_config.json, or two folders have one name.
    """
    listed = [Contender(OURS, sys.executable, "starling_worker", bundle.folder, bundle.graph_path)]
    folders = [(f"genai {folder.resolve().name}", folder) for folder in peer_models]
    if bundle_in_peer:
        folders.append(("genai, our bundle", bundle.folder))
    for name, folder in folders:
        if any(other.name == name for other in listed):
            raise UserError(f"two peer models are called {folder.resolve().name!r}; rename one of the folders")
        listed.append(Contender(name, peer_python, "genai_worker", folder.resolve(), _genai_graph(folder)))
    if len(listed) == 1:
        raise UserError("nothing to compare with; give --peer-model FOLDER or --bundle-in-peer")
    return listed


def _genai_graph(folder: Path) -> Path:
    try:
        return decoder_path(folder)
    except (OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{folder} has no usable genai_config.json ({error}); build it with the peer's own builder"
        ) from error


@contextmanager
def opened(contender: Contender, threads: int, capacity: int) -> Iterator[tuple[WorkerProcess, dict[str, Any]]]:
    """The contender's process with its model loaded, and what it said about itself."""
    with WorkerProcess(contender.name, contender.python, contender.module) as process:
        reply = process.request(op="open", model=str(contender.folder), threads=threads, capacity=capacity)
        yield (
            process,
            {
                "name": contender.name,
                "model": contender.folder.name,
                "graph": contender.graph.name,
                "precision": graph_precision(contender.graph),
                **reply,
            },
        )
