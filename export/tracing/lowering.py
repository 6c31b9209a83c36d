"""Swap a model's norms, projections, rotary embedding and attention for a dialect's, for the time of one trace.

Nothing here is named after a model family: norms are recognised by trying them, attention comes through transformers'
AttentionInterface, the mask through its AttentionMaskInterface, and the rotary embedding through the functions that
modelling files call `apply_rotary_…`. What does not fit is refused by name.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from starling.engine.errors import UnsupportedModelError
from starling.export.dialects.dialect import AttentionCall, Dialect, Rotary
from starling.export.tracing.abstract_nodes import NormNode, abstract_nodes, read_norm
from starling.export.tracing.experts import EXPERTS, experts_call
from starling.export.tracing.masks import CausalPattern, read_pattern
from starling.export.tracing.rotary import RotaryTable, even_first
from starling.export.tracing.rotary_calls import Placeholders, RotaryCalls

ATTENTION = "starling"
# What transformers passes to an attention function and which changes nothing in inference.
HARMLESS = frozenset(
    ["dropout", "position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits", "is_causal"]
)


@dataclass(frozen=True, slots=True)
class Heads:
    """One layer's attention heads, as the model called for them."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(slots=True)
class Step:
    """The tensors of the step being traced, and what its attention calls leave behind.

    Without `past` (None) the step is a survey: attention only notes its heads.
    """

    inputs: Mapping[str, Tensor]
    positions: Tensor  # int64 [batch, sequence]
    past: list[tuple[Tensor, Tensor]] | None
    heads: dict[int, Heads] = field(default_factory=dict)
    present: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rotated: dict[int, tuple[Tensor, Tensor, Rotary]] = field(default_factory=dict)  # after, before; by id(after)


class Lowering:
    """One model made ready to be traced in one dialect; `real` is the same model with real buffers."""

    def __init__(
        self, model: PreTrainedModel, real: PreTrainedModel, dialect: Dialect, dtype: torch.dtype, positions: int
    ) -> None:
        self.model, self.dialect, self._dtype, self._positions = model, dialect, dtype, positions
        self._step: Step | None = None
        self.rotary = RotaryCalls(model, real, self._rotate, positions)

    @property
    def step(self) -> Step:
        """The step being traced."""
        assert self._step is not None
        return self._step

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Swap everything in; modelling modules are put back at the end, the model object stays changed."""
        AttentionInterface.register(ATTENTION, self._attention)
        AttentionMaskInterface.register(ATTENTION, self._mask)
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, self._experts)
        self.model.set_attn_implementation(ATTENTION)
        for name, module in list(self.model.named_modules()):
            if type(module).__name__.endswith("RMSNorm") and (kind := read_norm(module)) is not None:
                self.model.set_submodule(name, NormNode(module, kind, self.dialect))
            if hasattr(module, "_apply_gate"):  # what transformers runs by its ExpertsInterface
                module.config._experts_implementation_internal = EXPERTS
        with abstract_nodes(), self.rotary.installed():
            yield

    def begin(self, step: Step) -> None:
        """Everything that is traced from now on belongs to `step`."""
        self._step = step
        self.rotary.placeholders = Placeholders()

    def register_tables(self) -> None:
        """Give the model a buffer for each rotary table that it asked for, so that the tables are the graph's."""
        for index, table in enumerate(self.rotary.tables):
            for name in table_buffers(index):
                self.model.register_buffer(name, torch.empty(table.cos.shape, dtype=self._dtype))

    def _mask(self, *_: Any, mask_function: Callable[..., Any], **__: Any) -> CausalPattern:
        return read_pattern(mask_function, self._positions)

    def _rotate(self, x: Tensor, table: RotaryTable) -> Tensor:
        """Rotate x; where attention gets the result as it is, it takes x and rotates by itself."""
        if self.step.past is None:
            return torch.empty_like(x)
        cos, sin = (getattr(self.model, name) for name in table_buffers(self.rotary.tables.index(table)))
        rotary = Rotary(cos, sin, table.interleaved)
        before = x.transpose(1, 2) if table.sequence_first else x
        if table.sorted_first:
            width = 2 * table.cos.shape[1]
            turned = even_first(before[..., :width])
            before = turned if width == x.shape[-1] else torch.cat((turned, before[..., width:]), dim=-1)
        after = self.dialect.rotate(before, rotary, self._table_rows(table))
        if table.sequence_first:
            return after.transpose(1, 2)
        if table.long_from is None:
            self.step.rotated[id(after)] = (after, before, rotary)
        return after

    def _table_rows(self, table: RotaryTable) -> Tensor:
        """Rows of the table for the step's positions: the second half's where the KV cache is made for long sequences.

        How long a sequence becomes is not known at its first step, so all of a session's are rotated alike.
        """
        positions = self.step.positions
        if table.long_from is None or self.step.past is None:
            return positions
        capacity = torch.scalar_tensor(self.step.past[0][0].shape[2], dtype=torch.int64)
        return positions + torch.where(capacity > table.long_from, table.cos.shape[0] // 2, 0)

    def _attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: CausalPattern | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        # `sliding_window` is taken and left: the mask is what the model's own attention would obey
        name = type(module).__name__
        for option, given in options.items():
            if given is not None and option not in HARMLESS:
                raise UnsupportedModelError(
                    f"{name}: attention option {option}={given!r} cannot be exported faithfully"
                )
        if not isinstance(attention_mask, CausalPattern):
            raise UnsupportedModelError(f"{name}: its attention does not use a causal mask that can be read")
        step = self.step
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        if layer in step.heads:
            raise UnsupportedModelError(f"{name}: layer {layer} attends more than once, over one KV cache")
        batch, heads, sequence, _ = query.shape
        step.heads[layer] = Heads(key.shape[1], key.shape[-1], value.shape[-1])
        if step.past is None:
            return query.new_empty(batch, sequence, heads, value.shape[-1]), None
        past_key, past_value = step.past[layer]
        scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
        width = past_key.shape[-1]
        query, key, rotary = self._unrotated(query, key, width)
        query, key, padded = (_padded(x, width) for x in (query, key, value))
        call = AttentionCall(
            query, key, padded, past_key, past_value, scale, attention_mask.window, rotary, softcap, s_aux
        )
        output, *present = self.dialect.attention(call, step.inputs)
        step.present[layer] = (present[0], present[1])
        return output.reshape(batch, sequence, heads, width)[..., : value.shape[-1]], None

    def _experts(self, module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        call = experts_call(module, x.flatten(0, -2), chosen.flatten(0, -2), weights.flatten(0, -2))
        return self.dialect.experts(call).reshape(x.shape)

    def _unrotated(self, query: Tensor, key: Tensor, width: int) -> tuple[Tensor, Tensor, Rotary | None]:
        """Query and key before their rotation, where attention can make up for it; else as they are, and None.

        Nothing may have touched them since, and their heads are of the cache's `width`.
        """
        rotated = [self.step.rotated.get(id(x)) for x in (query, key)]
        found = [r for r in rotated if r is not None]
        if (
            len(found) == 2
            and found[0][2].cos is found[1][2].cos
            and query.shape[-1] == width
            and self.dialect.can_rotate_inside(found[0][2], width)
        ):
            return found[0][1], found[1][1], found[0][2]
        return query, key, None


def _padded(x: Tensor, width: int) -> Tensor:
    """x with zeros in its last axis up to `width`; itself where there is nothing to add."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (0, width - x.shape[-1]))


def table_buffers(index: int) -> tuple[str, str]:
    """Names of the model's buffers that hold a rotary table in the trace."""
    return f"rotary_{index}_cos", f"rotary_{index}_sin"
