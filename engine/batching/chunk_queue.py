"""Chunks on their way from the engine's thread to their reader: a thread, an asyncio task, or a callback."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Callable
from threading import Condition

from starling.engine.errors import UserError
from starling.engine.generation.results import GenerationChunk


class ChunkQueue:
    """Thread-safe; written by one thread, read by one reader. The last chunk is the one with a finish_reason."""

    def __init__(self, on_chunk: Callable[[GenerationChunk], None] | None = None) -> None:
        """With `on_chunk` the chunks are handed to it, on the thread that puts them, and none is kept."""
        self._on_chunk = on_chunk
        self._chunks: deque[GenerationChunk] = deque()
        self._changed = Condition()
        self._wake: Callable[[], object] | None = None
        self._woken = False
        self.complete = False

    def put(self, chunk: GenerationChunk) -> None:
        """Hand a chunk over. Raises what `on_chunk` raises, or RuntimeError where the reader's event loop is closed."""
        last = chunk.finish_reason is not None
        if self._on_chunk is None or last:
            with self._changed:
                if self._on_chunk is None:
                    self._chunks.append(chunk)
                # Before the callback, which may ask for the result.
                self.complete = self.complete or last
                self._changed.notify_all()
        if self._on_chunk is not None:
            self._on_chunk(chunk)
        wake = self._wake
        if wake is not None and not self._woken:
            self._woken = True
            wake()

    def take(self) -> GenerationChunk | None:
        """Block for the next chunk; None after the last one. Raises UserError where a callback gets them."""
        self._refuse_callback()
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self.complete)
            return self._chunks.popleft() if self._chunks else None

    def wait(self, timeout_s: float | None) -> bool:
        """Wait for the last chunk to be put; False where that took longer."""
        with self._changed:
            return self._changed.wait_for(lambda: self.complete, timeout_s)

    async def chunks(self) -> AsyncGenerator[GenerationChunk, None]:
        """The chunks, for a task on a running asyncio loop. Raises UserError where a callback gets them."""
        import asyncio  # 30 ms that a program without it need not pay

        self._refuse_callback()
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self._wake = lambda: loop.call_soon_threadsafe(ready.set)
        try:
            while True:
                # In this order a chunk that is put meanwhile either is seen below or wakes us again.
                ready.clear()
                self._woken = False
                while self._chunks:
                    yield self._chunks.popleft()
                if self.complete and not self._chunks:
                    return
                await ready.wait()
        finally:
            self._wake = None

    def _refuse_callback(self) -> None:
        if self._on_chunk is not None:
            raise UserError("this request's chunks go to its on_chunk: read them there, or submit without it")
