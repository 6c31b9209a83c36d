"""The small inputs of a step for ONNX Runtime, in buffers that are allocated once: one class per dialect."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np

from starling.engine.backends.backend import Tokens
from starling.engine.backends.onnxruntime.step_outputs import ONNX_TYPES
from starling.engine.names import LOGITS_TO_KEEP, NOISE, PAST_LENGTHS, TEMPERATURE, TOP_K, TOP_P

#: Writes one decode step: tokens [rows], positions [rows], and their greatest.
StepWriter: TypeAlias = Callable[[Sequence[int], Sequence[int], int], None]


class _Input:
    """A small input of the graph: `host` is written at every step, in the memory that the graph reads."""

    def __init__(self, kind: str, shape: int | tuple[int, int]) -> None:
        self.kind = ONNX_TYPES[kind]
        self.host = np.zeros(shape, kind)


class StepInputs:
    """What every dialect takes: the token ids [rows, length]; and what the dialects have in common.

    `rows` is the most rows of a step, `chunk` the most tokens of a row, `positions` the KV cache's.
    """

    per_token: ClassVar[tuple[str, ...]] = ()
    per_row: ClassVar[dict[str, str]] = {}

    def __init__(self, rows: int, chunk: int, positions: int) -> None:
        tokens = max(rows, chunk)
        self._per_token = {name: _Input("int64", tokens) for name in ("input_ids", *self.per_token)}
        self._per_row = {name: _Input(kind, rows) for name, kind in self.per_row.items()}
        self._ids = self._per_token["input_ids"].host

    def bind(self, binding: Any, rows: int, length: int) -> None:
        """Bind the buffers' beginnings as inputs for `rows` rows of `length` tokens."""
        for name, buffer in self._per_token.items():
            _bind(binding, name, buffer, [rows, length])
        for name, buffer in self._per_row.items():
            _bind(binding, name, buffer, [rows])

    def write_chunk(self, tokens: Tokens | Sequence[int], start: int) -> None:
        """One row: `tokens` [n] go to positions start..start+n."""
        self._ids[: len(tokens)] = tokens
        self._place_chunk(start, start + len(tokens))

    def write_rows(self, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> None:
        """Several rows: `tokens` [k, n] go to positions starts[i]..+n of each."""
        length = len(tokens[0])
        self._ids[: len(tokens) * length].reshape(len(tokens), length)[:] = tokens
        self._place_rows(starts, length)

    def step_writer(self, rows: int) -> StepWriter:
        """The function that writes one decode step of `rows` rows.

        It writes through memoryviews that it keeps: after a run of the model the caches are cold, and NumPy's paths
        are long.
        """
        ids, place = self._ids.data, self._placer(rows)

        def write(tokens: Sequence[int], positions: Sequence[int], longest: int) -> None:
            for row, token in enumerate(tokens):
                ids[row] = token
            place(positions, longest)

        return write

    def _place_chunk(self, start: int, end: int) -> None:
        """Say that one row's new tokens go to positions start..end."""
        raise NotImplementedError

    def _place_rows(self, starts: Sequence[int], length: int) -> None:
        """Say that `length` new tokens of each row go to starts[i] and on: where a graph can verify drafts."""
        raise NotImplementedError

    def _placer(self, rows: int) -> Callable[[Sequence[int], int], None]:
        """A function (positions [rows], their greatest) that says where one new token of each row goes."""
        raise NotImplementedError


class OrtInputs(StepInputs):
    """GroupQueryAttention's lengths: by the operator's definition those of the rows after the step, minus 1."""

    per_row: ClassVar = {"seqlens_k": "int32"}

    def __init__(self, rows: int, chunk: int, positions: int) -> None:
        super().__init__(rows, chunk, positions)
        self._lengths = self._per_row["seqlens_k"].host
        self._total = _Input("int32", 1)

    def bind(self, binding: Any, rows: int, length: int) -> None:
        super().bind(binding, rows, length)
        _bind(binding, "total_sequence_length", self._total, [])

    def _place_chunk(self, start: int, end: int) -> None:
        self._lengths[0] = end - 1
        self._total.host[0] = end

    def _place_rows(self, starts: Sequence[int], length: int) -> None:
        self._lengths[: len(starts)] = [start + length - 1 for start in starts]
        self._total.host[0] = max(starts) + length

    def _placer(self, rows: int) -> Callable[[Sequence[int], int], None]:
        lengths, total = self._lengths.data, self._total.host.data

        def place(positions: Sequence[int], longest: int) -> None:
            for row, position in enumerate(positions):
                lengths[row] = position
            total[0] = longest + 1

        return place


class CanonicalInputs(StepInputs):
    """Positions of the new tokens, where they are written, and how many are valid then."""

    per_token: ClassVar = ("position_ids",)
    per_row: ClassVar = {"write_indices": "int64", "nonpad_kv_seqlen": "int64"}

    def __init__(self, rows: int, chunk: int, positions: int) -> None:
        super().__init__(rows, chunk, positions)
        self._positions = self._per_token["position_ids"].host
        self._starts, self._lengths = (self._per_row[name].host for name in self.per_row)

    def _place_chunk(self, start: int, end: int) -> None:
        self._positions[: end - start] = np.arange(start, end)
        self._starts[0] = start
        self._lengths[0] = end

    def _placer(self, rows: int) -> Callable[[Sequence[int], int], None]:
        ids, starts, lengths = self._positions[:rows], self._starts[:rows], self._lengths[:rows]

        def place(positions: Sequence[int], longest: int) -> None:
            ids[:] = positions
            starts[:] = positions
            np.add(starts, 1, out=lengths)

        return place


class TensorrtInputs(StepInputs):
    """How many positions are valid before the step; the choice in the graph is set to greedy, once."""

    per_row: ClassVar = {PAST_LENGTHS: "int64", TEMPERATURE: "float32", TOP_K: "int64", TOP_P: "float32"}

    def __init__(self, rows: int, chunk: int, positions: int) -> None:
        super().__init__(rows, chunk, positions)
        self._lengths = self._per_row[PAST_LENGTHS].host
        for name in (TEMPERATURE, TOP_K, TOP_P):
            self._per_row[name].host.fill(1)
        self._noise = _Input("float32", (rows, positions))

    def bind(self, binding: Any, rows: int, length: int) -> None:
        super().bind(binding, rows, length)
        _bind(binding, NOISE, self._noise, [rows, self._noise.host.shape[1]])

    def _place_chunk(self, start: int, end: int) -> None:
        self._lengths[0] = start

    def _placer(self, rows: int) -> Callable[[Sequence[int], int], None]:
        lengths = self._lengths[:rows]

        def place(positions: Sequence[int], longest: int) -> None:
            lengths[:] = positions

        return place


class KeptPositions:
    """Which of a step's tokens get logits: so many of the last ones, at most `most`. Written once."""

    def __init__(self, most: int) -> None:
        self._input = _Input("int64", most)
        self._input.host[:] = np.arange(-most, 0)

    def bind(self, binding: Any, kept: int) -> None:
        """Keep the last `kept` positions in every run of the binding."""
        _bind(binding, LOGITS_TO_KEEP, self._input, [kept], skip=len(self._input.host) - kept)


INPUTS: dict[str, type[StepInputs]] = {"ort": OrtInputs, "canonical": CanonicalInputs, "tensorrt": TensorrtInputs}


def _bind(binding: Any, name: str, buffer: _Input, shape: list[int], skip: int = 0) -> None:
    """Bind the buffer from its entry `skip` on."""
    pointer = buffer.host.ctypes.data + skip * buffer.host.itemsize
    binding.bind_input(name, "cpu", 0, buffer.kind, shape, pointer)
