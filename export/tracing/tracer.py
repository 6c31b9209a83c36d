"""Trace a causal language model once, without its weights, into an ONNX graph of one dialect."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from starling.engine.bundle.manifest import Architecture
from starling.engine.errors import StarlingError, UnsupportedModelError
from starling.engine.names import INPUT_IDS, LOGITS, LOGITS_TO_KEEP, PAST, PRESENT
from starling.export.dialects import Dialect, StepInput
from starling.export.graphs.rewrites import simplify
from starling.export.tracing.architecture import check_supported, head_dim_of, kv_heads_of
from starling.export.tracing.lowering import Lowering, Step, table_buffers
from starling.export.weights.weight_plan import Rows, Table, set_weight

TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_BATCH, _SEQUENCE, _CACHE, _KEPT = 2, 5, 16, 3  # example sizes; every one of them is a dynamic axis


@dataclass(frozen=True, slots=True)
class Trace:
    """A graph without weights: `weights.weight_of` says of each initializer what it is made of."""

    model: ir.Model
    architecture: Architecture


class _TraceCache:
    """Stands for the KV cache in the model's code; the real one is an input of the attention nodes."""

    is_compileable = False

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return key, value

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def get_query_offset(self, *_: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return query_length, 0


class _Traced(nn.Module):
    """The signature of the graph: ids, the dialect's step inputs and cache; logits, cache, further outputs."""

    def __init__(self, lowering: Lowering, step_inputs: list[StepInput]) -> None:
        super().__init__()
        self.model = lowering.model
        self._lowering, self._names = [lowering], [s.name for s in step_inputs]

    def forward(self, input_ids: Tensor, step: list[Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        lowering = self._lowering[0]
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        inputs = dict(zip(self._names, step, strict=True))
        lowering.step = Step(inputs, pairs)
        kept = inputs.get(LOGITS_TO_KEEP)
        with _only(kept, self.model.get_output_embeddings()):  # type: ignore[no-untyped-call]
            output = self.model(
                input_ids=input_ids,
                past_key_values=_TraceCache(),
                use_cache=True,
                logits_to_keep=1 if kept is None else 0,  # 0: all of them, less those that `_only` leaves out
                return_dict=True,
            )
        present = lowering.step.present
        missing = [i for i in range(len(pairs)) if i not in present]
        if missing:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: layer {missing[0]} has no softmax attention with a KV cache of its own"
            )
        cache = (tensor for i in range(len(pairs)) for tensor in present[i])
        return (output.logits, *cache, *lowering.dialect.further_outputs(output.logits, inputs, input_ids.shape[1]))


@contextmanager
def _only(kept: Tensor | None, lm_head: nn.Module) -> Iterator[None]:
    """Give lm_head only the positions `kept` [kept] (None: whatever comes).

    transformers takes such a tensor as `logits_to_keep` too, but what becomes of that is six nodes.
    """
    if kept is None:
        yield
        return
    hook = lm_head.register_forward_pre_hook(lambda module, inputs: (_gather(inputs[0], kept),))
    try:
        yield
    finally:
        hook.remove()


def _gather(x: Tensor, kept: Tensor) -> Tensor:
    """Positions `kept` [kept] of x [batch, sequence, hidden]; negative ones count from the end."""
    shape = (x.shape[0], kept.shape[0], x.shape[2])
    return torch.onnx.ops.symbolic("Gather", (x, kept), attrs={"axis": 1}, dtype=x.dtype, shape=shape, version=13)


def trace(config: PreTrainedConfig, dialect: Dialect, dtype: str) -> Trace:
    """Trace the model of `config` under fake tensors: no weight exists, so the memory taken is the graph's.

    Raises:
        UnsupportedModelError: the model has no causal-LM class or does something that cannot be lowered faithfully.
    """
    check_supported(config)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        model = _build(config, TORCH_DTYPES[dtype])
        with unset_fake_temporarily():
            lowering = Lowering(model, dialect)
        for index, table in enumerate(lowering.tables.values()):
            for name in table_buffers(index):
                model.register_buffer(name, torch.empty(table.cos.shape, dtype=TORCH_DTYPES[dtype]))
        architecture = _architecture(model)
        tied = _tied_names(model)
        with lowering.installed():
            graph = _export(lowering, dialect, architecture, TORCH_DTYPES[dtype])
    _plan_weights(graph, tied, lowering)
    simplify(graph)
    return Trace(graph, architecture)


def _plan_weights(graph: ir.Model, tied: dict[str, str], lowering: Lowering) -> None:
    """Say of every initializer which checkpoint tensor, or which rotary table, it stands for."""
    tables = {
        name: values
        for index, table in enumerate(lowering.tables.values())
        for name, values in zip(table_buffers(index), (table.cos, table.sin), strict=True)
    }
    for name, value in list(graph.graph.initializers.items()):
        own = name.removeprefix("model.")
        set_weight(value, Table(tables[own]) if own in tables else Rows((tied.get(own, own),)))
        value.name = own


def _build(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise UnsupportedModelError(f"{config.model_type}: transformers has no causal language model for it") from error
    return model.eval()  # type: ignore[no-any-return]


def _architecture(model: PreTrainedModel) -> Architecture:
    config = model.config
    return Architecture(
        model_type=config.model_type,
        class_name=type(model).__name__,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        layers=config.num_hidden_layers,
        query_heads=config.num_attention_heads,
        kv_heads=kv_heads_of(config),
        head_dim=head_dim_of(config),
        sliding_window=getattr(config, "sliding_window", None),
        max_positions=config.max_position_embeddings,
        parameters=sum(p.numel() for p in model.parameters()),
        tied_embeddings=bool(_tied_names(model)),
    )


def _tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameters that share a tensor: each name but the first, to the first."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return tied


def _export(lowering: Lowering, dialect: Dialect, arch: Architecture, dtype: torch.dtype) -> ir.Model:
    sizes = {"batch": _BATCH, "sequence": _SEQUENCE, "cache": _CACHE, "kept": _KEPT}
    steps = dialect.step_inputs()
    cache = (_BATCH, arch.kv_heads, _CACHE, arch.head_dim)
    names = [f"{i}.{side}" for i in range(arch.layers) for side in ("key", "value")]
    past = [torch.zeros(cache, dtype=dtype) for _ in names]
    inputs = (
        torch.zeros(_BATCH, _SEQUENCE, dtype=torch.int64),
        [torch.zeros([sizes[axis] for axis in s.axes], dtype=s.dtype) for s in steps],
        past,
    )
    dynamic = {
        INPUT_IDS: {0: "batch", 1: "sequence"},
        "step": [dict(enumerate(s.axes)) for s in steps],
        "past": [{0: "batch", 2: "cache"} for _ in names],
    }
    try:
        with _quiet():
            program = torch.onnx.export(
                _Traced(lowering, steps).eval(),
                inputs,
                dynamo=True,
                opset_version=dialect.opset,
                input_names=[INPUT_IDS, *(s.name for s in steps), *(f"{PAST}{n}" for n in names)],
                output_names=[LOGITS, *(f"{PRESENT}{n}" for n in names), *dialect.outputs],
                dynamic_shapes=dynamic,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise _explain(error, arch) from error
    assert program is not None
    return program.model


def _explain(error: BaseException, arch: Architecture) -> StarlingError:
    """Our own refusal from inside the trace where there was one, else the tracer's failure in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, StarlingError):
            return cause
        cause = cause.__cause__ or cause.__context__
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UnsupportedModelError(
        f"{arch.class_name}: it could not be traced ({reason[:200]}); run with --debug for more"
    )


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
