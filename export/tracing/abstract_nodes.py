"""What is one node in the graph whatever the model's code is: projections, embeddings and norms, whose weights are then
seen by what rewrites and quantizes; and the positions that are given, and those that are kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from starling.engine.errors import UnsupportedModelError
from starling.export.dialects.dialect import Dialect
from starling.export.graphs.rewrites import required, take_over

_POSITIONS = "Positions"


@contextmanager
def abstract_nodes() -> Iterator[None]:
    """Let every nn.Linear and nn.Embedding, and what a subclass takes of them, be one node while it is traced."""
    linear, embedding = nn.Linear.forward, nn.Embedding.forward
    nn.Linear.forward = _linear  # type: ignore[method-assign]
    nn.Embedding.forward = _embedding  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.forward = linear  # type: ignore[method-assign]
        nn.Embedding.forward = embedding  # type: ignore[method-assign]


def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    inputs = (input, self.weight) if self.bias is None else (input, self.weight, self.bias)
    shape = (*input.shape[:-1], self.out_features)
    return torch.onnx.ops.symbolic("starling::Linear", inputs, dtype=input.dtype, shape=shape, version=1)


def _embedding(self: nn.Embedding, input: Tensor) -> Tensor:
    shape = (*input.shape, self.weight.shape[1])
    return torch.onnx.ops.symbolic(
        "starling::Embedding", (input, self.weight), dtype=self.weight.dtype, shape=shape, version=1
    )


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """x * rsqrt(mean(x²) + epsilon) * (plus + weight)."""

    epsilon: float
    plus: float


class NormNode(nn.Module):
    """An RMSNorm in the dialect's words; its weight is planned as `plus` and the checkpoint's."""

    def __init__(self, norm: nn.Module, kind: RmsNorm, dialect: Dialect) -> None:
        super().__init__()
        self.weight = norm.weight
        self.kind, self.dialect = kind, dialect

    def forward(self, x: Tensor) -> Tensor:
        return self.dialect.norm(x, self.weight, self.kind.epsilon)  # type: ignore[arg-type]


def read_norm(norm: nn.Module) -> RmsNorm | None:
    """What an RMSNorm with one weight computes, found by trying; None where it is something else."""
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
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        for plus in (0.0, 1.0):
            if torch.allclose(theirs, normed * (plus + gamma), atol=1e-5):
                return RmsNorm(float(epsilon), plus)
    return None


def added_to_weights(model: nn.Module) -> dict[str, float]:
    """What is added to the weights of the swapped norms, by the parameter's name; those without are left out."""
    return {
        f"{name}.weight": module.kind.plus
        for name, module in model.named_modules()
        if isinstance(module, NormNode) and module.kind.plus
    }


@contextmanager
def only_positions(kept: Tensor | None, lm_head: nn.Module) -> Iterator[None]:
    """Give lm_head only the positions `kept` [kept] (None: whatever comes).

    transformers takes such a tensor as `logits_to_keep` too, but what becomes of that is six nodes.
    """
    if kept is None:
        yield
        return
    hook = lm_head.register_forward_pre_hook(lambda module, inputs: (gather(inputs[0], kept),))
    try:
        yield
    finally:
        hook.remove()


def marked(positions: Tensor) -> Tensor:
    """Positions with a mark in the graph, which shows whether the model asks for them."""
    return torch.onnx.ops.symbolic(
        f"starling::{_POSITIONS}", (positions,), dtype=positions.dtype, shape=positions.shape, version=1
    )


def unmark(graph: ir.Graph, name: str) -> None:
    """Take the mark out of the graph.

    Raises:
        UnsupportedModelError: it is not there: the model knows of positions by itself, and none after the first step.
    """
    marks = [node for node in graph if node.op_type == _POSITIONS]
    if not marks:
        raise UnsupportedModelError(f"{name}: its position embeddings are neither rotary nor made from position_ids")
    for node in marks:
        take_over(node.outputs[0], required(node.inputs[0]))
        graph.remove(node, safe=True)


def gather(x: Tensor, kept: Tensor) -> Tensor:
    """Positions `kept` [kept] of x [batch, sequence, hidden]; negative ones count from the end."""
    shape = (x.shape[0], kept.shape[0], x.shape[2])
    return torch.onnx.ops.symbolic("Gather", (x, kept), attrs={"axis": 1}, dtype=x.dtype, shape=shape, version=13)
