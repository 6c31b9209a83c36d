"""Who takes part in a comparison: each runtime with each model, and the process that runs it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError
from starling.profiling.peers.graph_precision import graph_precision, onnx_graph
from starling.profiling.peers.worker_process import WorkerProcess

OURS = "starling"
GENAI = "genai_worker"


@dataclass(frozen=True, slots=True)
class Contender:
    """One runtime with one model. `worker` is its module in workers/, `peer` the runtime's name.

    `precision` is that of the weights (fp32, fp16, int8, int4, …); `settings` are the worker's own.
    """

    name: str
    peer: str
    precision: str
    python: Path
    worker: str
    model: Path
    device: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def our_contenders(bundles: Sequence[Bundle], device: str) -> list[Contender]:
    """Starling with each bundle: "starling int8", or the folder's name where two bundles have one precision.

    Raises UserError where two would have one name.
    """
    count = Counter(map(bundle_precision, bundles))
    listed = []
    for bundle in bundles:
        precision = bundle_precision(bundle)
        name = f"{OURS} {precision}" if count[precision] == 1 else f"{OURS} {bundle.folder.resolve().name}"
        python = Path(sys.executable)
        listed.append(Contender(name, OURS, precision, python, "starling_worker", bundle.folder.resolve(), device))
    _require_names(listed)
    return listed


def bundle_precision(bundle: Bundle) -> str:
    """The precision of a bundle's weights, in the words of the catalogue."""
    return bundle.quantization.scheme if bundle.quantization else bundle.dtype


def in_genai(ours: Sequence[Contender], peers: Sequence[Contender]) -> list[Contender]:
    """onnxruntime-genai with each of our bundles, through its genai_config.json.

    Raises UserError where the peers have no onnxruntime-genai.
    """
    genai = next((peer for peer in peers if peer.worker == GENAI), None)
    if genai is None:
        raise UserError("onnxruntime-genai is not among the peers; set it up, or leave --bundle-in-peer out")
    return [
        Contender(f"{genai.peer}, {one.name}", genai.peer, one.precision, genai.python, GENAI, one.model, genai.device)
        for one in ours
    ]


def by_precision(ours: Sequence[Contender], others: Sequence[Contender]) -> dict[str, list[Contender]]:
    """The contenders of each precision that we have, ours first. Raises UserError where there is no peer for any.

    The order of precisions is that of `ours`, so that a group begins with our first contender: the others' base.
    """
    groups = {one.precision: [o for o in [*ours, *others] if o.precision == one.precision] for one in ours}
    _require_names([contender for group in groups.values() for contender in group])
    lonely = [precision for precision, group in groups.items() if all(one.peer == OURS for one in group)]
    if len(lonely) == len(groups):
        raise UserError(f"no peer has a model in {', '.join(lonely)}; set one up, or compare another bundle")
    return groups


def _require_names(listed: Sequence[Contender]) -> None:
    name, times = Counter(contender.name for contender in listed).most_common(1)[0]
    if times > 1:
        raise UserError(f"{times} contenders are called {name!r}; rename the folder of one")


@contextmanager
def opened(contender: Contender, threads: int, capacity: int) -> Iterator[tuple[WorkerProcess, dict[str, Any]]]:
    """The contender's process with its model loaded, and what it said about itself."""
    with WorkerProcess(contender.name, str(contender.python), contender.worker) as process:
        reply = process.request(
            op="open",
            model=str(contender.model),
            threads=threads,
            capacity=capacity,
            device=contender.device,
            settings=dict(contender.settings),
        )
        graph = onnx_graph(contender.model)
        yield (
            process,
            {
                "name": contender.name,
                "peer": contender.peer,
                "precision": contender.precision,
                "model": contender.model.name,
                "settings": dict(contender.settings),
                "operators": None if graph is None else graph_precision(graph),
                **reply,
            },
        )
