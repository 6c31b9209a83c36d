"""What the tracer asks of a dialect."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import onnx_ir as ir
import torch
from torch import Tensor

from starling.engine.bundle.model_records import Architecture
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.quantization.blocks import BlockQuantization

#: Attributes of an ONNX node, as torch.onnx.ops takes them.
Attributes = dict[str, int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]]


@dataclass(frozen=True, slots=True)
class StepInput:
    """A graph input that tells a step where it stands, beside input_ids and the KV cache.

    `axes` names the dynamic axes: () is a scalar, ("batch",) a vector, ("batch", "sequence") one value per new token,
    ("batch", "cache") one per position of the KV cache. An input called LOGITS_TO_KEEP, ("kept",), says which of the
    step's tokens get logits; without it the last one does.
    """

    name: str
    dtype: torch.dtype
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rotary:
    """A rotary embedding of the first 2 * cos.shape[1] channels of a head.

    `cos`, `sin`: [max_positions, rotary_dim / 2]. `interleaved` pairs channels (0, 1), (2, 3), … instead of
    (0, d/2), (1, d/2 + 1), ….
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One layer's attention as the model asked for it.

    `query`: [batch, query_heads, sequence, head_dim]; `key`, `value`: [batch, kv_heads, sequence, head_dim], not yet
    rotated; `past_key`, `past_value`: [batch, kv_heads, cache, head_dim]. `window` is the number of positions that a
    token sees, itself included (None: all). `rotary` is None where query and key are rotated already, or never are.
    `softcap`: a score s becomes softcap * tanh(s / softcap) (None: stays). `sinks`: [query_heads], a further score of
    each head, which takes its part of the softmax and adds no value.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    past_key: Tensor
    past_value: Tensor
    scale: float
    window: int | None
    rotary: Rotary | None
    softcap: float | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """What an expert does between its projections: g * sigmoid(alpha * g) * (v + beta), of gate g and value v.

    `interleaved`: the rows of the first projection are g, v, g, v, …, not all of g and then all of v. `limit`: g is at
    most so much, v at most so much to either side.
    """

    interleaved: bool
    alpha: float
    beta: float
    limit: float | None


@dataclass(frozen=True, slots=True)
class ExpertsCall:
    """One layer's experts as the model asked for them.

    `x`: [tokens, hidden]; `chosen`: int64 [tokens, k]; `weights`: [tokens, k]. `up`: [experts, 2 * width, hidden];
    `down`: [experts, hidden, width], both with their last two axes swapped where `transposed`. `up_bias`:
    [experts, 2 * width]; `down_bias`: [experts, hidden].
    """

    x: Tensor
    chosen: Tensor
    weights: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    gate: Gate
    transposed: bool


@dataclass(frozen=True, slots=True)
class Companion:
    """A further graph over the same weights, written to `file`; bundle.json says `record` of it under `field`.

    Nothing is said of it where `field` is None.
    """

    file: str
    model: ir.Model
    field: str | None = None
    record: Any = None


class Dialect(Protocol):
    """How norm, rotary embedding, KV cache and attention are written, and what is done to the finished graph."""

    name: str
    opset: int
    #: Quantization schemes that the dialect has operators for.
    schemes: tuple[str, ...]
    #: Heads are padded with zeros to a multiple of so many channels, which changes no product.
    head_multiple: int
    #: Names of `further_outputs`.
    outputs: tuple[str, ...]
    #: What has to be said of a comparison with PyTorch that ONNX Runtime's CPU made; None: nothing.
    comparison_note: str | None

    def step_inputs(self) -> list[StepInput]:
        """The inputs that this dialect needs beside `input_ids` and the KV cache."""
        ...

    def prefill_inputs(self) -> list[StepInput]:
        """Those of them that a graph needs which chooses no token; LOGITS_TO_KEEP is not among them."""
        ...

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMSNorm over the last axis, with FP32 statistics: x * rsqrt(mean(x²) + epsilon) * weight."""
        ...

    def positions(self, step: Mapping[str, Tensor], sequence: int) -> Tensor:
        """Positions of the new tokens, int64 [batch, sequence]."""
        ...

    def can_rotate_inside(self, rotary: Rotary, head_dim: int) -> bool:
        """Whether attention takes the rotary embedding itself, for heads of the KV cache's width."""
        ...

    def rotate(self, x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
        """Rotate x [batch, heads, sequence, head_dim] outside of attention, at positions int64 [batch, sequence]."""
        ...

    def attention(self, call: AttentionCall, step: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Causal attention over the cache and the new tokens.

        Returns the output [batch, sequence, query_heads * head_dim] and the present key and value, shaped as the past.
        """
        ...

    def experts(self, call: ExpertsCall) -> Tensor:
        """The weighed sum of what each token's chosen experts make of it, [tokens, hidden].

        Raises UnsupportedModelError where the dialect has no operator that reads the chosen ones' weights alone.
        """
        ...

    def further_outputs(self, logits: Tensor, step: Mapping[str, Tensor], sequence: int) -> tuple[Tensor, ...]:
        """What the graph gives beside logits and cache, from logits [batch, kept, vocab] and the step's token count."""
        ...

    def optimize(self, model: ir.Model) -> None:
        """Rewrite the traced graph in place; it still holds the abstract `starling::Linear` and `Embedding` nodes."""
        ...

    def companions(
        self, model: ir.Model, how: BlockQuantization | None, *, all_logits: bool = False
    ) -> list[Companion]:
        """The further graphs of a finished one, whose weights have been written; it is left as it is.

        With `all_logits` the one for onnxruntime-genai gives those of every token.
        """
        ...

    def settings(self, architecture: Architecture, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """JSON files that other runtimes want beside the graphs, by name."""
        ...
