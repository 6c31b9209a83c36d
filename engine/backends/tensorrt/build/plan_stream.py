"""A plan on its way from TensorRT to a file, piece by piece: it is as large as the weights and need not fit twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Sink = Callable[[memoryview], None]


def plan_stream(module: Any, sink: Sink) -> tuple[Any, list[Exception]]:
    """An IStreamWriter of a library's `module` that hands every piece to `sink`, and what `sink` raised.

    TensorRT knows no exceptions: it stops at a piece that was not taken.
    """
    errors: list[Exception] = []

    class Stream(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IStreamWriter.__init__(self)

        def write(self, data: Any) -> int:
            piece = memoryview(data)
            try:
                sink(piece)
            except Exception as error:
                errors.append(error)
                return 0
            return piece.nbytes

    return Stream(), errors
