"""Memory that the ONNX Runtime backend allocates once: KV cache, the small inputs of each dialect, logits, choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from starling.engine.backends.backend import RowPart, Tokens
from starling.engine.backends.logits import FINITE_TESTS, HOST_TYPES, LogitsReader, logits_reader
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.engine.names import LOGITS_TO_KEEP, NEXT_TOKENS, NOISE, PAST_LENGTHS, TEMPERATURE, TOP_K, TOP_P

# TensorProto.DataType values, which IOBinding takes.
ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}
# What a session calls the types of logits.
_HOST_NAMES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}


def logits_kind(session: Any) -> str | None:
    """The type of the logits that a session's graph gives; None where it gives none of a known type."""
    kinds = {output.name: output.type for output in session.get_outputs()}
    return _HOST_NAMES.get(kinds.get("logits", ""))


def first_line(error: Exception) -> str:
    """The line of ONNX Runtime's message that says what is wrong; where in its code, the others do."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def failed_run(error: Exception) -> BackendError:
    """For any exception: ONNX Runtime's share no base class of their own."""
    return BackendError(f"ONNX Runtime failed in a step of the model: {first_line(error)}")


def allocate_cache(ort: Any, bundle: Bundle, rows: int, positions: int) -> tuple[dict[str, Any], NDArray[Any]]:
    """OrtValues "{layer}.key" and "{layer}.value", each [max_batch, kv_heads, max_seq, head_dim], and their memory.

    That is one array [2 * layers, max_batch, kv_heads, max_seq, head_dim], so that a row is copied by one call.
    """
    names = [f"{i}.{side}" for i in range(bundle.architecture.layers) for side in ("key", "value")]
    shape = [len(names), rows, bundle.architecture.kv_heads, positions, bundle.architecture.head_dim]
    kind = bundle.kv_cache.dtype
    try:  # zeroed pages cost no memory until a token is written to them
        memory = np.zeros(shape, HOST_TYPES[kind])
        make = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
        return {name: make(part, ONNX_TYPES[kind]) for name, part in zip(names, memory, strict=True)}, memory
    except MemoryError as error:
        raise BackendError(
            f"no memory for a KV cache of {rows} row(s) of {positions} positions; lower --max-seq or the number of "
            f"rows: {first_line(error)}"
        ) from error


@dataclass(slots=True, eq=False)
class OrtOutput:
    """Implements `starling.engine.backends.backend.StepOutput` over the buffers' first rows."""

    tokens: Callable[[], list[int]]
    logits: LogitsReader


class StepOutputs:
    """Logits [rows, vocab] and the greedy choice [rows] in host memory, where ONNX Runtime writes them.

    A row is a row of the batch, or one of the positions kept of a single one. A graph without a choice of its own gets
    one from the logits.
    """

    def __init__(self, bundle: Bundle, rows: int, kind: str | None = None) -> None:
        """`kind`: of the logits, where the graph that runs gives others than the bundle's own."""
        kinds = {spec.name: spec.dtype for spec in bundle.graph.outputs}
        self._kind = kind or kinds.get("logits", "")
        if self._kind not in HOST_TYPES:
            raise BackendError(f"{bundle.folder}: the graph has no logits output of a known type; export it again")
        self._raw = np.zeros((rows, bundle.architecture.vocab_size), HOST_TYPES[self._kind])
        self._float32 = self._raw if self._kind == "float32" else np.zeros(self._raw.shape, np.float32)
        self._tokens = np.zeros((rows, 1), np.int64)
        self._chosen_in_graph = NEXT_TOKENS in kinds

    def bind(self, binding: Any, rows: int, kept: int = 1) -> None:
        """Bind the first rows as the graph's outputs for `rows` rows of the batch, `kept` positions of each."""
        shape = [rows, kept, self._raw.shape[1]]
        binding.bind_output("logits", "cpu", 0, ONNX_TYPES[self._kind], shape, self._raw.ctypes.data)
        if self._chosen_in_graph:
            binding.bind_output(NEXT_TOKENS, "cpu", 0, ONNX_TYPES["int64"], [rows, kept], self._tokens.ctypes.data)

    def output(self, rows: int) -> OrtOutput:
        """What a step of the first `rows` rows leaves behind, made once.

        It reads through memoryviews: after a run of the model the caches are cold, and NumPy's paths are long.
        """
        logits = logits_reader(self._raw[:rows], self._float32[:rows], self._kind)
        values, vocab, is_finite = self._raw.reshape(-1).data, self._raw.shape[1], FINITE_TESTS[self._kind]
        in_graph = self._tokens.reshape(-1)[:rows].data
        likeliest: Callable[[], list[int]] = (
            in_graph.tolist if self._chosen_in_graph else lambda: logits().argmax(axis=-1).tolist()
        )

        def tokens() -> list[int]:
            chosen, start = likeliest(), 0
            for row, token in enumerate(chosen):
                if not is_finite(values[start + token]):
                    chosen[row] = -1
                start += vocab
            return chosen

        def token() -> list[int]:
            chosen = in_graph[0]
            return [chosen if is_finite(values[chosen]) else -1]

        return OrtOutput(token if rows == 1 and self._chosen_in_graph else tokens, logits)


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

    def step_writer(self, rows: int) -> StepWriter:
        """The function that writes one decode step of `rows` rows, and says where its tokens go."""
        raise NotImplementedError

    def _place_chunk(self, start: int, end: int) -> None:
        """Say that one row's new tokens go to positions start..end."""
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

    def step_writer(self, rows: int) -> StepWriter:
        """It writes through memoryviews: after a run of the model the caches are cold, and NumPy's paths are long."""
        ids, lengths, total = self._ids.data, self._lengths.data, self._total.host.data

        def write(tokens: Sequence[int], positions: Sequence[int], longest: int) -> None:
            for row, token in enumerate(tokens):
                ids[row] = token
                lengths[row] = positions[row]
            total[0] = longest + 1

        return write


class PartsInputs:
    """What our kernels take for tokens of several rows, as many of each as there are: see their GroupQueryAttention."""

    def __init__(self, rows: int, tokens: int) -> None:
        self._ids, self._kept = _Input("int64", tokens), _Input("int64", tokens)
        self._parts, self._total = _Input("int32", 3 * rows), _Input("int32", 1)

    def bind_total(self, binding: Any) -> None:
        """Bind what no step changes: the kernels do not read it."""
        _bind(binding, "total_sequence_length", self._total, [])

    def write(self, binding: Any, parts: Sequence[RowPart], kept: Sequence[int]) -> None:
        """Write and bind one step's tokens, where they go, and which of them get logits."""
        ids, places, count = self._ids.host.data, self._parts.host.data, 0
        for number, (row, start, tokens) in enumerate(parts):
            places[3 * number], places[3 * number + 1], places[3 * number + 2] = row, start, len(tokens)
            for token in tokens:
                ids[count] = token
                count += 1
        self._kept.host[: len(kept)] = kept
        _bind(binding, "input_ids", self._ids, [1, count])
        _bind(binding, "seqlens_k", self._parts, [3 * len(parts)])
        _bind(binding, LOGITS_TO_KEEP, self._kept, [len(kept)])


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

    def step_writer(self, rows: int) -> StepWriter:
        ids, places = self._ids[:rows], self._positions[:rows]
        starts, lengths = self._starts[:rows], self._lengths[:rows]

        def write(tokens: Sequence[int], positions: Sequence[int], longest: int) -> None:
            ids[:] = tokens
            places[:] = positions
            starts[:] = positions
            np.add(starts, 1, out=lengths)

        return write


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

    def step_writer(self, rows: int) -> StepWriter:
        ids, lengths = self._ids[:rows], self._lengths[:rows]

        def write(tokens: Sequence[int], positions: Sequence[int], longest: int) -> None:
            ids[:] = tokens
            lengths[:] = positions

        return write


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
