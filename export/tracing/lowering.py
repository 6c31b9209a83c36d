"""Swap a model's norms, projections, rotary embedding and attention for a dialect's, for the time of one trace.

Nothing here is named after a model family: norms are recognised by trying them, attention comes through transformers'
AttentionInterface, the mask through its AttentionMaskInterface, and the rotary embedding through the function that
every modelling file calls `apply_rotary_pos_emb`. What does not fit is refused by name.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from starling.engine.errors import UnsupportedModelError
from starling.export.dialects.dialect import AttentionCall, Dialect, Rotary
from starling.export.tracing.architecture import head_dim_of
from starling.export.tracing.masks import CausalPattern, read_pattern
from starling.export.tracing.rotary import RotaryTable, make_table

ATTENTION = "starling"
# What transformers passes to an attention function and which changes nothing in inference.
HARMLESS = frozenset({"dropout", "position_ids", "use_cache", "cache_position", "output_attentions", "is_causal"})


@dataclass(slots=True)
class Step:
    """The tensors of the step being traced, and what its attention calls leave behind."""

    inputs: Mapping[str, Tensor]
    past: list[tuple[Tensor, Tensor]]
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rotary: dict[int, Rotary] = field(default_factory=dict)  # by id() of the cosines that the model passes around
    pending: tuple[Tensor, Tensor, Rotary] | None = None  # rotated query and key, not yet attended


class Lowering:
    """One model made ready to be traced in one dialect.

    `tables` holds a rotary table per set of arguments that the model calls its rotary embedding with.
    """

    def __init__(self, model: PreTrainedModel, dialect: Dialect) -> None:
        """Check the model's rotary embedding and find its tables.

        Raises:
            UnsupportedModelError: the rotary embedding is missing or of an unknown form.
        """
        self.model = model
        self.dialect = dialect
        self.step: Step | None = None
        self.modelling = sys.modules[type(model).__module__]
        self.tables = _rotary_tables(model, self._original_apply)

    @property
    def _original_apply(self) -> Callable[..., tuple[Tensor, Tensor]]:
        try:
            return self.modelling.apply_rotary_pos_emb  # type: ignore[no-any-return]
        except AttributeError:
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: its modelling code has no apply_rotary_pos_emb to lower"
            ) from None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Swap everything in; the modelling module is put back at the end, the model object stays changed."""
        original = self._original_apply
        AttentionInterface.register(ATTENTION, self._attention)
        AttentionMaskInterface.register(ATTENTION, self._mask)
        self.model.set_attn_implementation(ATTENTION)
        _swap_modules(self.model, self._replacement)
        self.modelling.apply_rotary_pos_emb = self._apply_rotary  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self.modelling.apply_rotary_pos_emb = original  # type: ignore[attr-defined]

    def _replacement(self, module: nn.Module) -> nn.Module | None:
        if type(module) is nn.Linear:
            return LinearNode(module)
        if type(module) is nn.Embedding:
            return EmbeddingNode(module)
        if type(module).__name__.endswith("RMSNorm") and (epsilon := _rms_epsilon(module)) is not None:
            return NormNode(module, epsilon, self.dialect)
        if _is_rotary(module):
            return RotaryNode(self)
        return None

    def _mask(self, *_: Any, mask_function: Callable[..., Any], **__: Any) -> CausalPattern:
        return read_pattern(mask_function, self.model.config.max_position_embeddings)

    def _apply_rotary(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        assert self.step is not None
        rotary = self.step.rotary.get(id(cos))
        if rotary is None:
            raise UnsupportedModelError(f"{type(self.model).__name__}: it changes its rotary table before it is used")
        self.step.pending = (q, k, rotary)
        return q, k

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: CausalPattern | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        # `sliding_window` is taken and left: the mask is what the model's own attention would obey
        name = type(module).__name__
        for option, given in options.items():
            if given is not None and option not in HARMLESS:
                raise UnsupportedModelError(
                    f"{name}: attention option {option}={given!r} cannot be exported faithfully"
                )
        if not isinstance(mask, CausalPattern):
            raise UnsupportedModelError(f"{name}: its attention does not use a causal mask that can be read")
        step = self.step
        assert step is not None
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer in step.present or layer >= len(step.past):
            raise UnsupportedModelError(f"{name}: layer {layer} does not have a KV cache of its own")
        past_key, past_value = step.past[layer]
        if (
            key.shape[1] != past_key.shape[1]
            or value.shape[-1] != past_value.shape[-1]
            or key.shape[-1] != past_key.shape[-1]
        ):
            raise UnsupportedModelError(f"{name}: layer {layer}'s heads differ from num_key_value_heads and head_dim")
        scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
        rotary = _take_rotary(step, query, key, name)
        call = AttentionCall(query, key, value, past_key, past_value, scale, mask.window, rotary)
        output, *present = self.dialect.attention(call, step.inputs)
        step.present[layer] = (present[0], present[1])
        batch, heads, sequence, head_dim = query.shape
        return output.reshape(batch, sequence, heads, head_dim), None


class LinearNode(nn.Module):
    """A projection as one abstract node, so that packing and quantizing see weights, not transposes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.out_features = linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        shape = (*x.shape[:-1], self.out_features)
        return torch.onnx.ops.symbolic("starling::Linear", inputs, dtype=x.dtype, shape=shape, version=1)


class EmbeddingNode(nn.Module):
    """The token embedding as one abstract node."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.weight = embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        shape = (*ids.shape, self.weight.shape[1])
        return torch.onnx.ops.symbolic(
            "starling::Embedding", (ids, self.weight), dtype=self.weight.dtype, shape=shape, version=1
        )


class NormNode(nn.Module):
    """An RMSNorm in the dialect's words."""

    def __init__(self, norm: nn.Module, epsilon: float, dialect: Dialect) -> None:
        super().__init__()
        self.weight = norm.weight
        self.epsilon, self.dialect = epsilon, dialect

    def forward(self, x: Tensor) -> Tensor:
        return self.dialect.norm(x, self.weight, self.epsilon)  # type: ignore[arg-type]


class RotaryNode(nn.Module):
    """Hands out the graph's tables in place of computed cosines and sines."""

    def __init__(self, lowering: Lowering) -> None:
        super().__init__()
        self._lowering = [lowering]  # in a list, so that the model does not become a submodule of itself

    def forward(self, x: Tensor, position_ids: Tensor, *arguments: Any, **named: Any) -> tuple[Tensor, Tensor]:
        lowering = self._lowering[0]
        key = (*arguments, *named.values())
        cos, sin = (getattr(lowering.model, buffer) for buffer in table_buffers(list(lowering.tables).index(key)))
        assert lowering.step is not None
        lowering.step.rotary[id(cos)] = Rotary(cos, sin, lowering.tables[key].interleaved)
        return cos, sin


def table_buffers(index: int) -> tuple[str, str]:
    """Names of the model's buffers that hold a rotary table in the trace."""
    return f"rotary_{index}_cos", f"rotary_{index}_sin"


def _take_rotary(step: Step, query: Tensor, key: Tensor, name: str) -> Rotary | None:
    """The rotary embedding to be applied to exactly these tensors.

    It is applied inside attention, so nothing may have touched query or key since.
    """
    pending, step.pending = step.pending, None
    if pending is None:
        return None
    if pending[0] is not query or pending[1] is not key:
        raise UnsupportedModelError(f"{name}: it changes query or key between rotary embedding and attention")
    return pending[2]


def _is_rotary(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RotaryEmbedding")


def _rotary_tables(
    model: PreTrainedModel, apply: Callable[..., tuple[Tensor, Tensor]]
) -> dict[tuple[Any, ...], RotaryTable]:
    embeddings = {type(m) for m in model.modules() if _is_rotary(m)}
    if len(embeddings) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: it has {len(embeddings)} kinds of rotary embedding, not one"
        )
    config = model.config
    embedding = embeddings.pop()(config=config)  # real buffers: the model's own are fake
    keys: list[tuple[Any, ...]] = [()]
    if "layer_type" in inspect.signature(embedding.forward).parameters:
        keys = [(kind,) for kind in dict.fromkeys(config.layer_types)]
    positions, dim = config.max_position_embeddings, head_dim_of(config)
    return {key: make_table(embedding, key, apply, positions, dim) for key in keys}


def _rms_epsilon(norm: nn.Module) -> float | None:
    """The epsilon of a module that computes x * rsqrt(mean(x²) + epsilon) * weight, found by trying; None otherwise."""
    epsilon = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = getattr(norm, "weight", None)
    if epsilon is None or weight is None or dict(norm.named_parameters()).keys() != {"weight"}:
        return None
    with unset_fake_temporarily():
        generator = torch.Generator().manual_seed(0)
        gamma = torch.randn(weight.shape, generator=generator)
        x = torch.randn(3, *weight.shape, generator=generator)
        try:
            theirs = torch.func.functional_call(norm, {"weight": gamma}, (x,))
        except Exception:  # a norm of another signature: it is traced as it is written
            return None
        ours = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * gamma
        return float(epsilon) if torch.allclose(theirs, ours, atol=1e-5) else None


def _swap_modules(parent: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> None:
    for name, child in parent.named_children():
        new = replacement(child)
        if new is None:
            _swap_modules(child, replacement)
        else:
            setattr(parent, name, new)
