"""The engine's side of the local socket: a connection is one request, and closing it cancels the request.

The socket is in Linux's abstract namespace: a process that is killed leaves no file behind. Only processes of the same
user are answered.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import socket
import struct
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from threading import Thread
from time import monotonic_ns

from starling.engine.batching.request import RequestHandle
from starling.engine.errors import ClosedError, QueueFullError, StarlingError, UserError
from starling.engine.generation.results import GenerationChunk, Timings
from starling.engine.generation.sampler import TokenLogprob
from starling.engine.serving_loop import ServingLoop
from starling.engine.text.tokenizer import Tokenizer
from starling.serving.api.interleave import interleave
from starling.serving.triton.socket_messages import (
    LINE_LIMIT,
    Delta,
    Job,
    Logprob,
    RequestError,
    Times,
    delta_line,
    error_line,
)

#: Called with each request that ended, on the socket's thread.
Ended = Callable[[Timings], None]


class EngineSocket:
    """Answers the requests of other processes with one serving loop, on a thread of its own."""

    def __init__(self, serving: ServingLoop, tokenizer: Tokenizer, ended: Ended) -> None:
        """Listen at `address` until `close`."""
        self._serving, self._tokenizer, self._ended = serving, tokenizer, ended
        #: Where entries connect; @ stands for the NUL with which names of the abstract namespace begin.
        self.address = f"@starling-{os.getpid()}-{secrets.token_hex(8)}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(socket_path(self.address))
        listener.listen(1024)
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._run, args=(listener,), name="starling-engine-socket", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    def _run(self, listener: socket.socket) -> None:
        asyncio.set_event_loop(self._loop)
        server = asyncio.start_unix_server(self._serve, sock=listener, limit=LINE_LIMIT)
        self._loop.run_until_complete(server)
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if _peer_user(writer) == os.geteuid() and (line := await reader.readline()):
                await self._answer(line, reader, writer)
        except ConnectionError:
            pass  # the entry has gone, or closed because its client cancelled
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            handles = await asyncio.to_thread(self._submit, line)
            gone = asyncio.ensure_future(reader.read(1))
            gone.add_done_callback(lambda _: _cancel(handles))
            try:
                # Read to the end also when nobody listens any more: the metrics count every request.
                async with aclosing(interleave([handle.chunks() for handle in handles])) as chunks:
                    async for index, chunk in chunks:
                        if not gone.done():
                            await self._tell(writer, self._delta(index, chunk), handles)
            finally:
                gone.cancel()
                _cancel(handles)
                for handle in handles:
                    await handle.settled()  # a delta that could not be made, an entry that is gone: it ends with a step
                    self._ended(handle.partial.timings)
        except StarlingError as error:
            writer.write(error_line(refusal(error)))
            await writer.drain()

    def _submit(self, line: bytes) -> list[RequestHandle]:
        """On another thread: a long line takes long to read."""
        job = Job.from_line(line)
        if job.choices > self._serving.most_together:
            problem = f"n is {job.choices}: this server takes {self._serving.most_together} at once"
            raise UserError(problem, detail="send several requests", field="n")
        return self._serving.submit_choices(job.prompt, job.params, job.choices, cache_salt=job.cache_salt)

    async def _tell(self, writer: asyncio.StreamWriter, delta: Delta, handles: Sequence[RequestHandle]) -> None:
        try:
            writer.write(delta_line(delta))
            await writer.drain()
        except ConnectionError:
            _cancel(handles)

    def _delta(self, index: int, chunk: GenerationChunk) -> Delta:
        return Delta(
            index=index,
            text=chunk.text,
            tokens=int(chunk.token is not None),
            logprobs=() if chunk.logprob is None else (self._named(chunk.logprob),),
            finish_reason=chunk.finish_reason,
            prompt_tokens=chunk.timings.prompt_tokens if chunk.timings is not None else 0,
            times=None if chunk.timings is None else _times(chunk.timings),
        )

    def _named(self, found: TokenLogprob) -> Logprob:
        top = tuple((token, logprob, self._text(token)) for token, logprob in found.top)
        return Logprob(found.token, found.logprob, self._text(found.token), top)

    def _text(self, token: int) -> str:
        return self._tokenizer.decode([token])


def _cancel(handles: Sequence[RequestHandle]) -> None:
    for handle in handles:
        handle.cancel()


def _times(timings: Timings) -> Times:
    """Of an answer that ends now."""
    return Times(
        submitted_ns=monotonic_ns() - round(timings.total_s * 1e9),
        queue_s=timings.queue_s,
        ttft_s=timings.ttft_s,
        total_s=timings.total_s,
        drafted_tokens=timings.drafted_tokens,
        accepted_tokens=timings.accepted_tokens,
    )


def socket_path(address: str) -> str:
    """The path that the socket calls take for an `EngineSocket.address`."""
    return address.replace("@", "\0", 1)


def stats_json(serving: ServingLoop) -> str:
    """The serving loop's figures as a JSON object."""
    stats = serving.stats()
    figures = ("max_batch", "running", "waiting", "submitted", "refused", "prompt_tokens", "generated_tokens")
    return json.dumps({**{name: getattr(stats, name) for name in figures}, "ended": dict(stats.ended)})


def refusal(error: StarlingError) -> RequestError:
    """What an engine's refusal is to a client."""
    if isinstance(error, QueueFullError | ClosedError):
        return RequestError(error.client_message, "unavailable")
    if isinstance(error, UserError):
        return RequestError(error.client_message, "invalid")
    return RequestError(str(error), "internal")


def _peer_user(writer: asyncio.StreamWriter) -> int:
    peer = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    user: int = struct.unpack("3i", peer)[1]
    return user
