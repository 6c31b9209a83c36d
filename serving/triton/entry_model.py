"""The Triton model behind an entry: reads a request by its convention, has the engine answer it, sends the responses.

An entry needs neither the engine nor its memory, only the names: what it validates it validates here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from threading import Lock, Thread
from typing import Any, ClassVar

from starling.engine.errors import UserError
from starling.serving.triton.entry_inputs import Inputs
from starling.serving.triton.entry_interface import Call, Interface
from starling.serving.triton.responses import Responses
from starling.serving.triton.socket_messages import LINE_LIMIT, PROMPT_LIMIT, Delta, RequestError, read_delta

#: Seconds between two looks at whether a client still waits, while no token comes.
CANCEL_POLL_S = 0.05
ENGINE_MODEL = "starling"
_GONE = "the engine's process is not running: load the model starling again, or restart the server"


class EntryModel:
    """A decoupled model; subclasses name their convention."""

    interface: ClassVar[Interface]

    def initialize(self, args: dict[str, Any]) -> None:
        """Start the thread that serves all requests."""
        self._responses = Responses()
        self._address: str | None = None
        self._address_lock = Lock()
        #: Running answers by their requests' ids, of requests that have one; the loop's thread alone touches it.
        self._running: dict[str, set[asyncio.Task[None]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="starling-entry", daemon=True)
        self._thread.start()

    def execute(self, requests: list[Any]) -> None:
        """Start answering; the responses come from the thread."""
        for request in requests:
            sender, wanted = request.get_response_sender(), set(request.requested_output_names())
            try:
                inputs = self._inputs(request)
                if self.interface.cancels(inputs):
                    asyncio.run_coroutine_threadsafe(self._cancel(request.request_id(), sender), self._loop)
                    continue
                call = self._read(request, inputs)
            except (RequestError, UserError) as error:
                self._responses.fail(sender, error)
                continue
            except Exception as error:  # the requests after it must be started all the same
                self._responses.fail_unexpectedly(sender, error)
                continue
            answer = self._answer_cancellably(request.request_id(), call, sender, wanted)
            asyncio.run_coroutine_threadsafe(answer, self._loop)

    def finalize(self) -> None:
        """End the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)

    def _inputs(self, request: Any) -> Inputs:
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        return Inputs(arrays, batched=self.interface.batched)

    def _read(self, request: Any, inputs: Inputs) -> Call:
        parameters = json.loads(request.parameters() or "{}")
        own = {name: value for name, value in parameters.items() if not name.startswith("triton_")}
        call = self.interface.read(inputs, own)
        if not call.job.prompt:
            raise RequestError("text_input is empty: give it at least one character")
        if len(call.job.prompt) > PROMPT_LIMIT:
            raise RequestError(f"text_input has {len(call.job.prompt):,} characters: give at most {PROMPT_LIMIT:,}")
        return call

    async def _cancel(self, request_id: str, sender: Any) -> None:
        """Cancel the answers to requests of an id; this request gets no text either."""
        if not request_id:
            self._responses.fail(sender, RequestError("stop is for a request with the id of those to cancel: send one"))
            return
        running = tuple(self._running.get(request_id, ()))
        for task in running:
            task.cancel()
        self._responses.fail(sender, RequestError(f"{len(running)} request(s) of this id were cancelled", "cancelled"))

    async def _answer_cancellably(self, request_id: str, call: Call, sender: Any, wanted: set[str]) -> None:
        task = asyncio.ensure_future(self._answer(call, sender, wanted))
        if request_id:
            self._running.setdefault(request_id, set()).add(task)
        try:
            await task
        except asyncio.CancelledError:
            self._responses.fail(sender, RequestError("the request was cancelled", "cancelled"))
        finally:
            if request_id:
                self._running[request_id].discard(task)
                if not self._running[request_id]:
                    del self._running[request_id]

    async def _answer(self, call: Call, sender: Any, wanted: set[str]) -> None:
        try:
            ready = [Delta(call.prefix)] * call.job.choices
            async for delta in self._deltas(call, sender):
                index = delta.index
                ready[index] = ready[index] + delta
                last = all(one.finish_reason is not None for one in ready)
                # Tokens without text yet, half a character for example, go out with the text that they become.
                if last or (call.stream and ready[index].text):
                    self._responses.send(sender, call.answer.outputs(ready), wanted, last=last)
                    ready = [one.sent() for one in ready]
        except RequestError as error:
            self._responses.fail(sender, error)
        except Exception as error:  # nobody else would tell the client
            self._responses.fail_unexpectedly(sender, error)

    async def _deltas(self, call: Call, sender: Any) -> AsyncIterator[Delta]:
        """The engine's deltas to the end of all answers; raises RequestError where one fails or the client has gone."""
        left = call.job.choices
        reader, writer = await self._connected()
        try:
            writer.write(call.job.to_line())
            await writer.drain()
            while left:
                delta = await self._next(reader, sender)
                left -= delta.finish_reason is not None
                yield delta
        except (ConnectionError, EOFError):
            raise RequestError("the engine's process ended before the answer did: try again", "unavailable") from None
        finally:
            writer.close()  # which cancels what is not finished

    async def _next(self, reader: asyncio.StreamReader, sender: Any) -> Delta:
        line = asyncio.ensure_future(reader.readline())
        try:
            while not (await asyncio.wait([line], timeout=CANCEL_POLL_S))[0]:
                self._check_cancelled(sender)
            self._check_cancelled(sender)
            if not line.result():
                raise EOFError
            delta = read_delta(line.result())
        finally:
            line.cancel()
        if delta.finish_reason == "cancelled":
            raise RequestError("the request was cancelled because the engine is closing", "unavailable")
        return delta

    def _check_cancelled(self, sender: Any) -> None:
        if sender.is_cancelled():
            raise RequestError("the request was cancelled", "cancelled")

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the engine; its address is asked for again where it has moved with a reload."""
        for fresh in (False, True):
            address = await asyncio.to_thread(self._find_address, fresh)
            try:
                return await asyncio.open_unix_connection(address.replace("@", "\0", 1), limit=LINE_LIMIT)
            except (ConnectionError, FileNotFoundError):
                continue
        raise RequestError(_GONE, "unavailable")

    def _find_address(self, fresh: bool) -> str:
        with self._address_lock:
            if self._address is None or fresh:
                self._address = self._ask_address()
            return self._address

    def _ask_address(self) -> str:
        """Where the engine listens, asked through Triton. Raises RequestError where its process is dead."""
        import numpy as np

        pb_utils = self._responses.pb_utils
        command = pb_utils.Tensor("command", np.array([b"address"], dtype=object))
        request = pb_utils.InferenceRequest(
            model_name=ENGINE_MODEL, requested_output_names=["answer"], inputs=[command]
        )
        response = request.exec()
        if response.has_error():
            raise RequestError(f"{_GONE} ({response.error().message()})", "unavailable")
        answer = pb_utils.get_output_tensor_by_name(response, "answer")
        return bytes(answer.as_numpy().ravel()[0]).decode()
