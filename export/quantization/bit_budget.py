"""Which projections get 8 bits in place of 4, so that the bits of a weight are a given number on average.

Those in which rounding costs most a weight. What it costs is judged in one pass of a text through the model: rounding
projection j alone to 4 bits changes its outputs by a part e_j of their squares. What it belongs to (attention or MLP)
adds its result to the stream of hidden states, of which it is a part s; so the stream changes by about e_j s of its
squares. That is a guess of the loss, but one that needs neither gradients nor the whole model in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from starling.engine.progress import Advance
from starling.export.check.sample_texts import TokenRows, text_pieces
from starling.export.checkpoints.checkpoint import TensorSource
from starling.export.quantization.blocks import BlockQuantization, dequantize, quantize_rows
from starling.export.quantization.streamed_model import StreamedModel

#: Tokens of the calibration that the choice is made on.
JUDGED_TOKENS = 1024


class RoundingCosts:
    """How much of the stream of hidden states rounding each projection to `how` changes: filled by `run`."""

    def __init__(self, names: Iterable[str], how: BlockQuantization, rows: TokenRows) -> None:
        """`names`: the checkpoint's tensors of the projections to be judged, on the text of `rows`."""
        self._names, self._how, self._rows = frozenset(names), how, rows
        self._changed: dict[str, float] = {}
        #: Of each tensor, the module that it belongs to, and of those what part of the stream their result is.
        self._part_of: dict[str, str] = {}
        self._share: dict[str, float] = {}

    def run(self, config: PreTrainedConfig, tensors: TensorSource, progress: Advance | None = None) -> dict[str, float]:
        """Costs by tensor; memory holds one module's weights and the activations of all rows.

        Raises:
            CheckpointError: the checkpoint was cut off or changed since it was opened.
        """
        streamed = StreamedModel(config, tensors, progress)
        decoder = streamed.model.base_model
        modules = dict(decoder.named_modules(prefix=streamed.model.base_model_prefix))
        stream: list[Tensor] = []
        for name, module in modules.items():
            if isinstance(module, nn.Linear) and f"{name}.weight" in self._names:
                streamed.before(name, partial(self._judge, f"{name}.weight"))
                part, _, _ = name.rpartition(".")
                layer, _, _ = part.rpartition(".")
                self._part_of[f"{name}.weight"] = part
                if part not in self._share and not isinstance(modules.get(layer), nn.ModuleList | None):
                    self._share[part] = 1.0
                    modules[part].register_forward_hook(partial(self._weigh, part, stream))
        for layer in {part.rpartition(".")[0] for part in self._share}:
            # Of a layer that takes them by name nothing is known: every part of it counts the same.
            streamed.before(layer, lambda _, *given: stream.__setitem__(slice(None), given[:1]))
        streamed.run(self._rows.ids)
        return {name: cost * self._share.get(self._part_of[name], 1.0) for name, cost in self._changed.items()}

    def _judge(self, name: str, module: nn.Module, x: Tensor) -> None:
        weight = module._parameters["weight"]
        assert weight is not None
        rounded = dequantize(quantize_rows(weight, self._how), self._how, weight.shape[1])
        inputs = torch.cat([*text_pieces(x, self._rows)])
        change, whole = functional.linear(inputs, weight - rounded), functional.linear(inputs, weight)
        self._changed[name] = float(change.square().sum() / whole.square().sum().clamp(min=1e-30))

    def _weigh(self, part: str, stream: list[Tensor], _: nn.Module, __: object, result: Tensor | tuple[Tensor]) -> None:
        added = result if isinstance(result, Tensor) else result[0]
        if stream and stream[0].shape == added.shape:
            squares = [
                sum(float(piece.square().sum()) for piece in text_pieces(x, self._rows)) for x in (added, stream[0])
            ]
            self._share[part] = squares[0] / max(squares[1], 1e-30)


def choose_eight_bits(units: Mapping[tuple[str, ...], int], costs: Mapping[str, float], bits: float) -> frozenset[str]:
    """The tensors that get 8 bits: the costliest a weight, as many as fit into `bits` a weight on average.

    `units` are the tensors that are packed into one, and how many weights they have together.
    """
    left = (bits - 4) / 4 * sum(units.values())
    by_weight = {unit: sum(costs.get(name, 0.0) for name in unit) / size for unit, size in units.items()}
    chosen: list[str] = []
    for unit in sorted(units, key=lambda unit: -by_weight[unit]):
        if units[unit] <= left and by_weight[unit] > 0:
            chosen += unit
            left -= units[unit]
    return frozenset(chosen)
