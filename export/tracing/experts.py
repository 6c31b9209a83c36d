"""Mixtures of experts: what one layer's experts compute, found by trying, as one call of the dialect.

transformers' ExpertsInterface hands over a token's chosen experts and their weights, so every way of routing is the
model's own. What an expert does between its two projections is tried with real numbers.
"""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn

from starling.engine.errors import UnsupportedModelError
from starling.export.dialects.canonical import gate_of
from starling.export.dialects.dialect import ExpertsCall, Gate
from starling.export.tracing.masks import untraced

EXPERTS = "starling"
_WEIGHTS, _BIASES = ("gate_up_proj", "down_proj"), ("gate_up_proj_bias", "down_proj_bias")


def experts_call(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> ExpertsCall:
    """One layer's experts over x [tokens, hidden], each token's `chosen` ones [tokens, k] weighed by `weights`.

    Raises:
        UnsupportedModelError: an expert does something else than two projections around a SiLU gate.
    """
    name = type(module).__name__
    if not module.has_gate or module.has_post_expert_norm:
        raise UnsupportedModelError(f"{name}: experts without a gate, or with a norm after them, cannot be exported")
    gate = untraced(_read_gate, module)
    if gate is None:
        raise UnsupportedModelError(f"{name}: its experts' activation is not a gate by SiLU, which is all that exports")
    up_bias, down_bias = (getattr(module, name) if module.has_bias else None for name in _BIASES)
    up, down = (getattr(module, name) for name in _WEIGHTS)
    return ExpertsCall(x, chosen, weights, up, down, up_bias, down_bias, gate, bool(module.is_transposed))


def _read_gate(module: nn.Module) -> Gate | None:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn(64, 8, generator=generator)
    with torch.no_grad():
        theirs = module._apply_gate(x)  # type: ignore[operator]
    return next((gate for gate in _gates(module) if torch.allclose(theirs, gate_of(x, gate), atol=1e-5)), None)


def _gates(module: nn.Module) -> Iterator[Gate]:
    """Gates with the constants that the module has."""
    numbers = {name: float(value) for name, value in vars(module).items() if isinstance(value, float | int)}
    alphas = dict.fromkeys([1.0, *(value for name, value in numbers.items() if "alpha" in name)])
    limits = dict.fromkeys([None, *(value for name, value in numbers.items() if "limit" in name)])
    for interleaved, alpha, beta, limit in product((False, True), alphas, (0.0, 1.0), limits):
        yield Gate(interleaved, alpha, beta, limit)
