"""The Triton model of a bundle that scores or embeds: texts in, raw scores or vectors out.

It is not decoupled, so that plain `infer` works; `execute` returns at once all the same, and answers come from a thread
of their own. So texts of several requests share runs of the engine's.
"""

from __future__ import annotations

import asyncio
import json
from threading import Thread
from typing import Any

import numpy as np

from starling.engine.backends.pooling_backend import Vectors
from starling.engine.errors import StarlingError
from starling.engine.pooling.text_pooler import PreparedText
from starling.engine.pooling_loop import PoolingLoop
from starling.serving.triton.engine_model import open_engine
from starling.serving.triton.engine_socket import refusal
from starling.serving.triton.entry_inputs import Inputs
from starling.serving.triton.entry_model import CANCEL_POLL_S
from starling.serving.triton.responses import Responses
from starling.serving.triton.scoring_inputs import NUMBERS, TOKENS, ScoringCall, read_call
from starling.serving.triton.socket_messages import RequestError


class TritonPythonModel:
    """What Triton's Python backend makes of this model: one instance, one engine."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the bundle that config.pbtxt names. What it raises is Triton's reason to refuse."""
        self._responses = Responses()
        self._engine, settings = open_engine(args)
        self._pooler = self._engine.pooler
        self._pooling = PoolingLoop(self._engine, **settings)
        #: Requests that may be here at a time, those whose texts are still being read included.
        self._most = settings["queue_limit"] + self._engine.max_batch
        self._open = 0
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="starling-scoring", daemon=True)
        self._thread.start()
        self._responses.pb_utils.Logger.log_info(
            f"starling: {self._engine.bundle.folder} on {self._engine.model.name}, {self._engine.max_batch} texts of "
            f"up to {self._engine.max_seq} tokens in a run, loaded in {self._engine.load_seconds:.2f} s"
        )

    def execute(self, requests: list[Any]) -> None:
        """Start answering; the responses come from the thread."""
        for request in requests:
            sender, wanted = request.get_response_sender(), set(request.requested_output_names())
            try:
                call = _read(request)
            except RequestError as error:
                self._responses.fail(sender, error)
            except Exception as error:  # the requests after it must be started all the same
                self._responses.fail_unexpectedly(sender, error)
            else:
                asyncio.run_coroutine_threadsafe(self._answer(call, sender, wanted), self._loop)

    def finalize(self) -> None:
        """End what has not run, and free the engine."""
        self._pooling.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._engine.close()

    async def _answer(self, call: ScoringCall, sender: Any, wanted: set[str]) -> None:
        try:
            if self._open >= self._most:
                raise RequestError(f"{self._open} request(s) wait or run already: try again later", "unavailable")
            self._open += 1
            try:
                texts = await asyncio.to_thread(call.prepared, self._pooler)
                vectors = await self._numbers(texts, sender)
            finally:
                self._open -= 1
        except RequestError as error:
            self._responses.fail(sender, error)
        except StarlingError as error:
            self._responses.fail(sender, refusal(error))
        except Exception as error:  # nobody else would tell the client
            self._responses.fail_unexpectedly(sender, error)
        else:
            numbers = self._pooler.activated(vectors) if call.activation else vectors
            tokens = np.array([text.tokens for text in texts], np.uint32)
            outputs = {NUMBERS[self._engine.bundle.task]: numbers, TOKENS: tokens}
            self._responses.send(sender, outputs, wanted, last=True)

    async def _numbers(self, texts: list[PreparedText], sender: Any) -> Vectors:
        """Raises RequestError where the client has gone; what has not run then never runs."""
        future = self._pooling.submit(texts)
        waiting = asyncio.wrap_future(future)
        try:
            while not (await asyncio.wait([waiting], timeout=CANCEL_POLL_S))[0]:
                if sender.is_cancelled():
                    raise RequestError("the request was cancelled", "cancelled")
            return waiting.result()
        finally:
            future.cancel()


def _read(request: Any) -> ScoringCall:
    inputs = Inputs({tensor.name(): tensor.as_numpy() for tensor in request.inputs()}, batched=False)
    parameters = json.loads(request.parameters() or "{}")
    return read_call(inputs, {name: value for name, value in parameters.items() if not name.startswith("triton_")})
