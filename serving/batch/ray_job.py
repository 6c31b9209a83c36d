"""A batch on a Ray cluster: Ray Data hands entries to engines on its nodes; this process alone writes the results."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from starling.engine.engine import Engine
from starling.serving.batch.input_lines import BadLine, Entry
from starling.serving.batch.runner import Record, answer

#: Entries that a worker takes at once, for each row of its KV cache: the rows of one block end together.
ENTRIES_PER_SLOT = 8


@dataclass(frozen=True, slots=True)
class RayJob:
    """How a batch runs on a cluster. `bundle` must be there under this path on every node."""

    bundle: str
    #: Of an existing cluster; "auto" is the one of this machine or of RAY_ADDRESS.
    address: str
    workers: int
    #: GPUs of each worker, 0 for CPU.
    gpus: float
    #: Keyword arguments of Engine.
    settings: dict[str, Any]
    prefill_chunk: int
    prefix_cache: int


def answer_on_ray(
    entries: Iterable[Entry], job: RayJob, on_bad_line: Callable[[BadLine], None]
) -> Iterator[list[Record]]:
    """Records block by block, in the order in which the workers finish them.

    Ray runs a block again where its node is lost, which changes nothing here: a result counts when it is written.
    """
    import ray
    import ray.data

    ray.init(address=job.address, ignore_reinit_error=True, log_to_driver=False)
    block = job.settings["max_batch"] * ENTRIES_PER_SLOT
    # As bytes: Arrow would make one structure of all dictionaries, with every key that any of them has.
    rows = ray.data.from_items([{"entry": pickle.dumps(entry)} for entry in entries])
    answered = rows.repartition(target_num_rows_per_block=block).map_batches(
        _Worker, fn_constructor_args=(job,), batch_size=block, concurrency=job.workers, num_gpus=job.gpus
    )
    for output in answered.iter_batches(batch_size=None, prefetch_batches=0):
        records: list[Record] = []
        for item in output["answered"]:
            entry, record, bad = pickle.loads(item)
            if bad:
                on_bad_line(BadLine(bad))
            else:
                records.append((entry, record))
        if records:
            yield records


class _Worker:
    """One engine on a node of the cluster."""

    def __init__(self, job: RayJob) -> None:
        self._engine = Engine(job.bundle, **job.settings)
        self._prefill_chunk, self._prefix_cache = job.prefill_chunk, job.prefix_cache

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        """Answer a block: pickled (entry, record, ""), or (None, None, what is wrong with the line)."""
        bad: list[str] = []
        answered = answer(
            self._engine,
            [pickle.loads(item) for item in batch["entry"]],
            prefill_chunk=self._prefill_chunk,
            prefix_cache=self._prefix_cache,
            on_bad_line=lambda line: bad.append(str(line)),
        )
        rows: list[tuple[Entry | None, dict[str, Any] | None, str]] = [
            (entry, record, "") for together in answered for entry, record in together
        ]
        return {"answered": [pickle.dumps(row) for row in [*rows, *((None, None, line) for line in bad)]]}
