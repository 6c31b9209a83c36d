"""Trace a causal language model once, without its weights, into an ONNX graph of one dialect."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from transformers import PreTrainedConfig, PreTrainedModel

from starling.engine.bundle.manifest import OUTPUT_OF
from starling.engine.bundle.model_records import Architecture
from starling.engine.errors import StarlingError, UnsupportedModelError
from starling.engine.names import INPUT_IDS, LOGITS_TO_KEEP, PAST, PRESENT, Task
from starling.export.checkpoints.checkpoint import empty_model
from starling.export.checkpoints.model_class import auto_class, head_of
from starling.export.dialects import Dialect, StepInput
from starling.export.graphs.rewrites import simplify
from starling.export.tracing.abstract_nodes import added_to_weights, gather, marked, only_positions, unmark
from starling.export.tracing.architecture import architecture_of, check_supported, positions_of, tied_names
from starling.export.tracing.lowering import Heads, Lowering, Step, table_buffers
from starling.export.tracing.masks import StandInUsed
from starling.export.weights.weight_plan import Rows, Table, set_weight

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_BATCH, _SEQUENCE, _CACHE, _KEPT = 2, 5, 16, 3  # example sizes; every one of them is a dynamic axis


@dataclass(frozen=True, slots=True)
class Trace:
    """A graph without weights: `weights.weight_of` says of each initializer what it is made of."""

    model: ir.Model
    architecture: Architecture
    notes: tuple[str, ...] = ()
    #: Sequences of more tokens are rotated by other factors; None: all alike.
    long_from: int | None = None


class _TraceCache:
    """Stands for the KV cache in the model's code; the real one is an input of the attention nodes."""

    is_compileable = False

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def __getattr__(self, name: str) -> Any:
        raise StandInUsed(f"it keeps a state other than keys and values ({name}), which the KV cache cannot hold")

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def get_query_offset(self, *_: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return query_length, 0


class _Traced(nn.Module):
    """The signature of the graph: ids, the dialect's step inputs and cache; logits, cache, further outputs.

    A graph that scores or embeds gives those in place of logits, and nothing further.
    """

    def __init__(self, lowering: Lowering, step_inputs: list[StepInput], task: Task) -> None:
        super().__init__()
        self.model, self._task = lowering.model, task
        self._lowering, self._names = [lowering], [s.name for s in step_inputs]

    def forward(self, input_ids: Tensor, step: list[Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        lowering = self._lowering[0]
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        inputs = dict(zip(self._names, step, strict=True))
        positions = lowering.dialect.positions(inputs, input_ids.shape[1])
        if not lowering.rotary.tables:  # then they are in the graph where the model has asked for them
            positions = marked(positions)
        lowering.begin(Step(inputs, positions, pairs or None))
        kept = inputs.get(LOGITS_TO_KEEP)
        if self._task != "generate":
            assert kept is not None
            output = self._pooled(input_ids, positions, kept)
            return (output, *_present(lowering.step, len(pairs)))
        with only_positions(kept, self.model.get_output_embeddings()):  # type: ignore[no-untyped-call]
            output = self.model(
                input_ids=input_ids,
                position_ids=positions,
                past_key_values=_TraceCache(),
                use_cache=True,
                logits_to_keep=1 if kept is None else 0,  # 0: all of them, less those that `only_positions` leaves out
                return_dict=True,
            )
        cache = _present(lowering.step, len(pairs))
        return (output.logits, *cache, *lowering.dialect.further_outputs(output.logits, inputs, input_ids.shape[1]))

    def _pooled(self, input_ids: Tensor, positions: Tensor, kept: Tensor) -> Tensor:
        """Scores or hidden states, float32 [batch, kept, labels or hidden]."""
        output = self.model.base_model(
            input_ids=input_ids,
            position_ids=positions,
            past_key_values=_TraceCache(),
            use_cache=True,
            return_dict=True,
        )
        hidden = gather(output.last_hidden_state, kept).float()
        return head_of(self.model)(hidden) if self._task == "score" else hidden


def _present(step: Step, layers: int) -> Iterator[Tensor]:
    return (tensor for i in range(layers) for tensor in step.present[i])


def trace(
    config: PreTrainedConfig, dialect: Dialect, dtype: str, positions: int | None = None, task: Task = "generate"
) -> Trace:
    """Trace the model of `config` under fake tensors: no weight exists, so the memory taken is the graph's.

    `task` "score" and "embed" give the scores of its head, or the hidden states, at the positions kept. `positions` is
    the longest sequence that the graph takes, by default as `positions_of` says.

    Raises:
        UserError: `positions` is more than the model has.
        UnsupportedModelError: the model has no causal-LM class or does something that cannot be lowered faithfully.
    """
    check_supported(config)
    positions = positions_of(config, positions)
    real = empty_model(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = _build(config, TORCH_DTYPES[dtype])
        if task == "score":
            head = head_of(model)  # what the model is asked for: in full precision
            for name, parameter in head.named_parameters():
                setattr(head, name, nn.Parameter(parameter.float(), requires_grad=False))
        lowering = Lowering(model, real, dialect, TORCH_DTYPES[dtype], positions)
        parameters, tied = sum(p.numel() for p in model.parameters()), tied_names(model)
        with lowering.installed():
            heads = _survey(lowering, task)
            architecture = architecture_of(model, heads.kv_heads, heads.key_dim, positions, parameters, tied=bool(tied))
            lowering.register_tables()
            graph = _export(lowering, architecture, TORCH_DTYPES[dtype], task)
    if not lowering.rotary.tables:
        unmark(graph.graph, architecture.class_name)
    _plan_weights(graph, tied, lowering, real)
    simplify(graph)
    long_from = [table.long_from for table in lowering.rotary.tables if table.long_from is not None]
    return Trace(graph, architecture, lowering.rotary.notes(), long_from[0] if long_from else None)


def _survey(lowering: Lowering, task: Task) -> Heads:
    """Run the model once, without a graph, to see how it attends and rotates; the heads that its KV cache has.

    Raises:
        UnsupportedModelError: it does something that cannot be lowered faithfully, or its layers are of several kinds.
    """
    inputs = _step_inputs(lowering.dialect, task)
    ids, steps = _example_inputs(inputs)
    name = type(lowering.model).__name__
    try:
        _Traced(lowering, inputs, task)(ids, steps, [])
    except Exception as error:
        raise _explain(error, name) from error
    heads = lowering.step.heads
    missing = [i for i in range(lowering.model.config.num_hidden_layers) if i not in heads]
    if missing:
        raise UnsupportedModelError(
            f"{name}: layer {missing[0]} has no softmax attention that goes through transformers' AttentionInterface, "
            "with keys and values of its own"
        )
    first = heads[0]
    for layer, other in sorted(heads.items()):
        if other != first:
            raise UnsupportedModelError(
                f"{name}: the KV caches of layers 0 and {layer} differ ({_describe(first)}; {_describe(other)})"
            )
    multiple = lowering.dialect.head_multiple
    width = -(-max(first.key_dim, first.value_dim) // multiple) * multiple
    return Heads(first.kv_heads, width, width)


def _describe(heads: Heads) -> str:
    return f"{heads.kv_heads} heads of {heads.key_dim} and {heads.value_dim}"


def _plan_weights(graph: ir.Model, tied: dict[str, str], lowering: Lowering, real: PreTrainedModel) -> None:
    """Say of every initializer which checkpoint tensor or rotary table it stands for; what is neither is a constant."""
    tables = {
        name: values
        for index, table in enumerate(lowering.rotary.tables)
        for name, values in zip(table_buffers(index), (table.cos, table.sin), strict=True)
    }
    plus, stored, buffers = added_to_weights(lowering.model), real.state_dict().keys(), dict(real.named_buffers())
    for name, value in list(graph.graph.initializers.items()):
        own = name.removeprefix("model.")
        if own in tables:
            set_weight(value, Table(tables[own]))
        elif own in buffers and own not in stored:
            assert value.dtype is not None
            value.const_value = TorchTensor(buffers[own].to(to_torch_dtype(value.dtype)), name=own)
        else:
            set_weight(value, Rows((tied.get(own, own),), plus=plus.get(own, 0.0)))
        value.name = own


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    model = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval()  # type: ignore[no-any-return]


def _step_inputs(dialect: Dialect, task: Task) -> list[StepInput]:
    if task == "generate":
        return dialect.step_inputs()
    return [*dialect.prefill_inputs(), StepInput(LOGITS_TO_KEEP, torch.int64, ("kept",))]


def _example_inputs(step_inputs: list[StepInput]) -> tuple[Tensor, list[Tensor]]:
    """Token ids and the further inputs, all zeros."""
    sizes = {"batch": _BATCH, "sequence": _SEQUENCE, "cache": _CACHE, "kept": _KEPT}
    steps = [torch.zeros([sizes[axis] for axis in s.axes], dtype=s.dtype) for s in step_inputs]
    return torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64), steps


def _export(lowering: Lowering, arch: Architecture, dtype: torch.dtype, task: Task) -> ir.Model:
    dialect = lowering.dialect
    steps = _step_inputs(dialect, task)
    names = [f"{i}.{side}" for i in range(arch.layers) for side in ("key", "value")]
    past = [torch.zeros(_BATCH, arch.kv_heads, _CACHE, arch.head_dim, dtype=dtype) for _ in names]
    inputs = (*_example_inputs(steps), past)
    further = dialect.outputs if task == "generate" else ()
    dynamic = {
        INPUT_IDS: {0: "batch", 1: "sequence"},
        "step": [dict(enumerate(s.axes)) for s in steps],
        "past": [{0: "batch", 2: "cache"} for _ in names],
    }
    try:
        with _quiet():
            program = torch.onnx.export(
                _Traced(lowering, steps, task).eval(),
                inputs,
                dynamo=True,
                opset_version=dialect.opset,
                input_names=[INPUT_IDS, *(s.name for s in steps), *(f"{PAST}{n}" for n in names)],
                output_names=[OUTPUT_OF[task], *(f"{PRESENT}{n}" for n in names), *further],
                dynamic_shapes=dynamic,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise _explain(error, arch.class_name) from error
    assert program is not None
    return program.model


def _explain(error: BaseException, name: str) -> StarlingError:
    """Our own refusal from inside the trace where there was one, else the tracer's failure in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StandInUsed):
            return UnsupportedModelError(f"{name}: {cause}")
        if isinstance(cause, StarlingError):
            return cause
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return UnsupportedModelError(
            f"{name}: its code decides by what is in its tensors ({error}), which no graph can"
        )
    while error.__cause__ is not None:  # the deepest says what is missing, those above it what to ask PyTorch for
        error = error.__cause__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UnsupportedModelError(f"{name}: it could not be traced ({reason[:200]}); run with --debug for more")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the tracer's progress lines and its warnings about dynamic axes; errors still come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
