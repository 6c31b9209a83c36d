"""The PyTorch model with the rounding of a Q/DQ plan: the twin of the quantized graph, for judging plans quickly."""

import gc
from collections.abc import Collection, Mapping
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from starling.export.check.sample_texts import TokenRows
from starling.export.check.torch_reference import load_reference
from starling.export.checkpoints.checkpoint import TensorSource
from starling.export.quantization.qdq_projections import InputPlan, QdqPlan
from starling.export.quantization.qdq_scheme import INT8, quantize_weight, round_to_grid, weight_scales
from starling.export.quantization.qdq_settings import QdqQuantization


class Simulation:
    """A float32 model of smoothed `tensors` whose projections round as `plan` says, each when it is switched on.

    Memory: the float32 weights and their quantized copies, until `close`; a `with` block closes it.
    """

    def __init__(self, config: PreTrainedConfig, tensors: TensorSource, plan: QdqPlan) -> None:
        self._model = load_reference(config, tensors)
        self._active: set[str] = set()
        modules = [m for m in self._model.modules() if isinstance(m, nn.Linear)]
        names = _names_by_weight(self._model)
        for module in modules:
            for name in names[id(module.weight)]:
                if name in plan.inputs:
                    self._install(module, name, plan.inputs[name], plan.how)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the model, which its modules' replaced methods would otherwise keep until some later collection."""
        for module in self._model.modules():
            module.__dict__.pop("forward", None)
        del self._model
        gc.collect()

    def activate(self, weights: Collection[str]) -> None:
        """Round exactly these projections, by the names of the checkpoint's tensors."""
        self._active = set(weights)

    def log_probabilities(self, rows: TokenRows) -> Tensor:
        """Log-probabilities [tokens, vocab] float32 after every token of `rows`."""
        with torch.inference_mode():
            logits = self._model(rows.ids, use_cache=False).logits
            text = torch.cat([row[:length] for row, length in zip(logits, rows.lengths, strict=True)])
            return text.float().log_softmax(dim=-1)

    def _install(self, module: nn.Linear, name: str, plan: InputPlan, how: QdqQuantization) -> None:
        grid, activations = how.weights, how.activations or INT8
        scales = weight_scales(module.weight, grid, how.block_for(module.in_features), torch.float32)
        data = quantize_weight(module.weight, scales, grid)
        scale = torch.tensor(plan.scale)

        def forward(input: Tensor) -> Tensor:
            x = input if plan.multiplier is None else input * plan.multiplier
            if name not in self._active:
                return functional.linear(x, module.weight, module.bias)
            if how.activations is not None:
                x = round_to_grid(x, scale, activations)
            weight = data.view(len(data), scales.shape[1], -1).float() * scales[..., None]
            return functional.linear(x, weight.flatten(1), module.bias)

        module.forward = forward  # type: ignore[method-assign]


def mean_kl(reference: Tensor, other: Tensor) -> float:
    """Mean KL(reference || other) in nats of log-probabilities [tokens, vocab]."""
    return float((reference.exp() * (reference - other)).sum(dim=-1).mean())


def _names_by_weight(model: nn.Module) -> Mapping[int, list[str]]:
    """All names of each parameter, by its id(): lm_head's weight may be the embedding's."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
