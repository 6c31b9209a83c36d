"""Decoding on a backend that chooses tokens itself: a step is launched before the host has looked at the last one's.

Stop checks and detokenizing then run beside the next step. The tokens are those of the plain loop; of a step that was
launched behind a row's end the row's token is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from time import perf_counter

from starling.engine.backend import Backend, TokenPipeline
from starling.engine.batch import DecodeBatch


def decode_ahead(backend: Backend, pipeline: TokenPipeline, batch: DecodeBatch) -> Iterator[list[int]]:
    """Decode until all rows are done, or one is at the end of the cache; yields the rows that got a token in a step.

    Rows that are left then are for the plain loop, which knows how to let a full row stand.
    """
    ahead = 0
    while batch.live:
        begin, model_begin = perf_counter(), backend.model_seconds
        while (rows := rows_behind(batch, ahead)) and pipeline.can_launch(rows):
            pipeline.launch(rows)
            ahead += 1
        if not ahead:
            return
        live = batch.live
        chosen = pipeline.tokens()
        ahead -= 1
        batch.accept(chosen, None)
        batch.record(live, perf_counter() - begin, backend.model_seconds - model_begin)
        yield live


def rows_behind(batch: DecodeBatch, ahead: int) -> int:
    """Rows of the step behind `ahead` launched ones, up to the last one that may still go on; 0 for no step."""
    for row in reversed(batch.live):
        sequence = batch.sequences[row]
        if len(sequence.tokens) + ahead < sequence.limit:
            return row + 1
    return 0
