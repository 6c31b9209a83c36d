"""ONNX Runtime on the CPU: a session whose KV cache is allocated once, and bound as past and as present."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from starling.engine.backends.backend import (
    CUDA,
    MOST_VERIFIED,
    MOST_VERIFIED_TOGETHER,
    RowPart,
    StepOutput,
    Tokens,
    check_room,
    check_scored,
    chunk_length,
    most_scored,
)
from starling.engine.backends.onnxruntime.cpu_session import CPU, cpu_kernels, open_cpu_session
from starling.engine.backends.onnxruntime.row_copies import HostRowCopies
from starling.engine.backends.onnxruntime.step_buffers import (
    INPUTS,
    KeptPositions,
    OrtOutput,
    PartsInputs,
    StepOutputs,
    StepWriter,
    allocate_cache,
    failed_run,
    logits_kind,
)
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError
from starling.engine.installation import install_command
from starling.engine.names import LOGITS_TO_KEEP


def why_not_on_cuda(ort: Any, bundle: Bundle) -> str | None:
    """Why ONNX Runtime's CUDA provider cannot run the bundle; None where it may be tried."""
    if CUDA not in ort.get_available_providers():
        return (
            "backend onnxruntime-cuda: this onnxruntime is built without CUDA; "
            f"pip uninstall onnxruntime, then {install_command('gpu')}; or use --backend onnxruntime-cpu"
        )
    refused = f"{bundle.folder}: ONNX Runtime's {CUDA} cannot run this bundle: "
    if bundle.dialect != "ort":
        return f"{refused}it runs the {bundle.dialect} dialect as the CPU's reference only: export with --dialect ort"
    if (kind := bundle.replaced_kv_dtype) is not None:
        return f"{refused}its KV cache stays {kind} there: leave kv_dtype out"
    if bundle.dtype == "fp32":
        return f"{refused}fp32 attention has no CUDA kernel: export with --dtype fp16, or use the CPU"
    return None


def check_runs_on_cpu(bundle: Bundle) -> None:
    """Raise BackendError where neither our kernels nor ONNX Runtime's run the bundle: its MatMul lacks bf16."""
    if bundle.dtype != "bf16":
        return
    kernels, why_not = cpu_kernels(bundle)
    if kernels is None:
        raise BackendError(
            f"{bundle.folder}: ONNX Runtime's {CPU} cannot run this bundle: bf16 has no CPU kernels"
            f"{'' if why_not is None else f' ({why_not})'}: export with --dtype fp32, or use CUDA "
            f"({install_command('gpu')})"
        )


@dataclass(slots=True, eq=False)
class _Step:
    """All that a decode step of so many rows needs, made once."""

    binding: Any
    write: StepWriter
    output: OrtOutput


@dataclass(slots=True, eq=False)
class _Verification:
    """All that verifying so many tokens of a row needs, made once."""

    binding: Any
    output: OrtOutput


class OrtBackend:
    """Implements `starling.engine.backends.backend.Backend` with ONNX Runtime on the CPU. Not thread-safe."""

    name = "onnxruntime"
    provider = CPU
    steps_ahead = None
    note: str | None = None

    def __init__(
        self,
        bundle: Bundle,
        *,
        max_seq: int,
        max_batch: int,
        threads: int,
        prefill_chunk: int,
        takes_turns: bool = False,
        profile_prefix: Path | None = None,
    ) -> None:
        """`takes_turns` as of `open_cpu_session`. With `profile_prefix` ONNX Runtime times every operator;
        `end_profiling` then gives the file.
        """
        opened = open_cpu_session(bundle, threads, takes_turns=takes_turns, profile_prefix=profile_prefix)
        self._session: Any = opened.session
        self.kernels, self.kernels_note = opened.kernels, opened.kernels_note
        #: The file that was loaded.
        self.graph_path = opened.graph_path
        self.threads, self.max_seq, self.max_batch = threads, max_seq, max_batch
        self.vocab_size = bundle.architecture.vocab_size
        self.kv_cache_bytes = bundle.kv_cache.bytes_per_token * max_seq * max_batch
        self.model_seconds = 0.0
        self.prefill_chunk = min(prefill_chunk, max_seq)
        self._cache, self._cache_memory = allocate_cache(opened.ort, bundle, max_batch, max_seq)
        longest = max(self.prefill_chunk, MOST_VERIFIED_TOGETHER, max_batch)
        self._most_kept = max(max_batch, MOST_VERIFIED_TOGETHER)
        self._inputs = INPUTS[bundle.dialect](max_batch, longest, max_seq)
        self._bundle, self._why_last_only = bundle, _why_last_only(bundle)
        can_keep = self._why_last_only is None
        self.most_scored = most_scored(self.vocab_size, self.prefill_chunk) if can_keep else 0
        self._kept = KeptPositions(max(MOST_VERIFIED, self.most_scored)) if can_keep else None
        self._logits = logits_kind(self._session)
        # A page of it takes memory when it is written to.
        self._outputs = StepOutputs(bundle, self._most_kept, self._logits)
        self._verifications: dict[tuple[int, int], _Verification] = {}
        self._row_bindings: dict[int, Any] = {}
        self._steps: dict[int, _Step] = {}
        self._row_output = self._outputs.output(1)
        #: What `score` writes to, allocated by its first call.
        self._scores: StepOutputs | None = None
        #: The binding of `mix` and what it is written to; None where it is not to be had.
        self._mixing = self._new_mixing(longest)
        self._mixed_outputs: dict[int, OrtOutput] = {}
        self.most_mixed = longest if self._mixes() else 0
        #: ONNX Runtime's GroupQueryAttention takes several new tokens of one row only.
        self.verified_rows = 0 if self._why_last_only is not None else max_batch if self.most_mixed else 1

    def prefill(self, row: int, tokens: Tokens, start: int) -> StepOutput:
        """Write `tokens` int64 [n] at start..start+n of row `row`.

        GroupQueryAttention takes a chunk after a non-empty cache only with batch 1, hence the view of one row.
        """
        first = 0
        while first < len(tokens):
            chunk = tokens[first : first + chunk_length(len(tokens) - first, self.prefill_chunk)]
            check_room(self, row, start + first + len(chunk) - 1)
            self._inputs.write_chunk(chunk, start + first)
            self._run(self._row_binding(row, len(chunk)))
            first += len(chunk)
        return self._row_output

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> StepOutput:
        """One token for each of the first k rows."""
        rows, longest = len(tokens), max(positions)
        if longest >= self.max_seq or rows > self.max_batch:
            check_room(self, rows - 1, longest)
        step = self._steps.get(rows) or self._new_step(rows)
        step.write(tokens, positions, longest)
        begin = perf_counter()
        try:  # as `_run`: a call takes 4 µs, with cold caches
            self._session.run_with_iobinding(step.binding)
        except Exception as error:
            raise failed_run(error) from error
        finally:
            self.model_seconds += perf_counter() - begin
        return step.output

    def check_verifies(self) -> None:
        """Raise BackendError where the graph gives the last position's logits only."""
        self._check_keeps("no draft can be verified")

    def check_scores(self) -> None:
        """Raise BackendError where the graph gives the last position's logits only."""
        self._check_keeps("no prompt can be scored")

    def score(self, row: int, tokens: Tokens, start: int) -> StepOutput:
        """Write `tokens` int64 [n] at start..start+n of row `row`; the output has n rows."""
        self.check_scores()
        count = len(tokens)
        check_scored(count, self.most_scored)
        check_room(self, row, start + count - 1)
        self._scores = outputs = self._scores or StepOutputs(self._bundle, self.most_scored, self._logits)
        binding = self._bind(row, 1, kept=count, outputs=outputs)  # 0.2 ms, of a run of many tokens
        self._inputs.bind(binding, 1, count)
        self._inputs.write_chunk(tokens, start)
        self._run(binding)
        return outputs.output(count)

    def verify(self, row: int, tokens: Sequence[int], start: int) -> StepOutput:
        """Write `tokens` [n] at start..start+n of row `row`; the output has n rows."""
        self.check_verifies()
        check_room(self, row, start + len(tokens) - 1)
        found = self._verifications.get((row, len(tokens))) or self._new_verification(row, len(tokens))
        self._inputs.write_chunk(tokens, start)
        self._run(found.binding)
        return found.output

    def mix(self, parts: Sequence[RowPart], kept: Sequence[int]) -> StepOutput:
        """Write tokens of several rows in one run; the output has a row for each of `kept`."""
        if self._mixing is None:
            raise BackendError(
                "ONNX Runtime's own attention takes equally many tokens of each row: use the CPU kernels"
            )
        count = 0
        for row, start, tokens in parts:
            count += len(tokens)
            check_room(self, row, start + len(tokens) - 1)
        if count > self.most_mixed or not 1 <= len(kept) <= self._most_kept:
            raise BackendError(
                f"{count} tokens are to run in one step, {len(kept)} of them with logits: give at most "
                f"{self.most_mixed}, and 1 to {self._most_kept}"
            )
        return self._run_parts(parts, kept)

    def _run_parts(self, parts: Sequence[RowPart], kept: Sequence[int]) -> OrtOutput:
        assert self._mixing is not None
        binding, inputs = self._mixing
        inputs.write(binding, parts, kept)
        self._outputs.bind(binding, 1, len(kept))
        self._run(binding)
        output = self._mixed_outputs.get(len(kept))
        if output is None:
            output = self._mixed_outputs[len(kept)] = self._outputs.output(len(kept))
        return output

    def row_copies(self, blocks: int) -> HostRowCopies:
        """Memory for so many blocks of positions, and copies between it and rows."""
        return HostRowCopies(self._cache_memory, blocks)

    def clear(self, row: int) -> None:
        """Nothing to do: the operators read no position after a row's end (tested on the CPU)."""

    def end_profiling(self) -> Path:
        """The file in which ONNX Runtime has timed every operator, complete from now on."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the session, the cache and every binding."""
        self._row_bindings.clear()
        self._steps.clear()
        self._verifications.clear()
        self._scores = None
        self._cache.clear()
        self._cache_memory = self._cache_memory[:0]
        self._session = None

    def _new_mixing(self, tokens: int) -> tuple[Any, PartsInputs] | None:
        if self.kernels is None or self._why_last_only is not None:
            return None
        binding, inputs = self._bind(0, self.max_batch), PartsInputs(self.max_batch, tokens)
        inputs.bind_total(binding)
        return binding, inputs

    def _mixes(self) -> bool:
        """Whether `mix` runs: a bundle's graph for the kernels may have its products in them, and its attention not."""
        if self._mixing is None or self.max_seq < 2:
            return False
        try:
            self._run_parts([RowPart(0, 0, (0, 0))], [1])
        except BackendError:
            self._mixing = None
        finally:
            self.model_seconds = 0.0
            self._cache_memory[:, :1, :, :2] = 0
        return self._mixing is not None

    def _check_keeps(self, consequence: str) -> None:
        if self._why_last_only is not None:
            problem, remedy = self._why_last_only
            raise BackendError(f"{problem}, so {consequence}: {remedy}")

    def _run(self, binding: Any) -> None:
        begin = perf_counter()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise failed_run(error) from error
        finally:
            self.model_seconds += perf_counter() - begin

    def _new_step(self, rows: int) -> _Step:
        binding = self._bind(0, rows)
        self._inputs.bind(binding, rows, 1)
        step = self._steps[rows] = _Step(binding, self._inputs.step_writer(rows), self._outputs.output(rows))
        return step

    def _new_verification(self, row: int, length: int) -> _Verification:
        if not 1 <= length <= MOST_VERIFIED:
            raise BackendError(f"{length} tokens are to be verified in one step: give 1 to {MOST_VERIFIED}")
        binding = self._bind(row, 1, kept=length)
        self._inputs.bind(binding, 1, length)
        made = self._verifications[row, length] = _Verification(binding, self._outputs.output(length))
        return made

    def _row_binding(self, row: int, length: int) -> Any:
        binding = self._row_bindings.get(row)
        if binding is None:
            binding = self._row_bindings[row] = self._bind(row, 1)
        self._inputs.bind(binding, 1, length)
        return binding

    def _bind(self, first: int, rows: int, kept: int = 1, outputs: StepOutputs | None = None) -> Any:
        """A binding whose past and present are the same memory: rows first..first+rows of the cache.

        Its outputs are those of the last `kept` positions of each row.
        """
        binding = self._session.io_binding()
        for name, buffer in self._cache.items():
            _, heads, positions, head_dim = buffer.shape()
            kind, shape = buffer.element_type(), [rows, heads, positions, head_dim]
            pointer = buffer.data_ptr() + buffer.tensor_size_in_bytes() // self.max_batch * first
            binding.bind_input(f"past_key_values.{name}", "cpu", 0, kind, shape, pointer)
            binding.bind_output(f"present.{name}", "cpu", 0, kind, shape, pointer)
        if self._kept is not None:
            self._kept.bind(binding, kept)
        (outputs or self._outputs).bind(binding, rows, kept)
        return binding


def _why_last_only(bundle: Bundle) -> tuple[str, str] | None:
    """Why the graph cannot give logits after several tokens of a row, and what to do; None where it can."""
    if any(spec.name == LOGITS_TO_KEEP for spec in bundle.graph.inputs):
        return None
    how = "export the model again" if bundle.dialect == "ort" else "export it with --dialect ort"
    return f"{bundle.folder}: its graph gives the last token's logits only", how
