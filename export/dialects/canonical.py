"""The portable dialect: standard opset 24 only. The oracle that the others are checked against."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from starling.engine.bundle.model_records import Architecture
from starling.engine.errors import UnsupportedModelError
from starling.engine.names import SCHEMES_OF
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.dialects.dialect import AttentionCall, Attributes, Companion, ExpertsCall, Gate, Rotary, StepInput
from starling.export.quantization.blocks import BlockQuantization


class CanonicalDialect:
    """RMSNormalization, RotaryEmbedding, TensorScatter and Attention of the ONNX standard."""

    name = "canonical"
    opset = 24
    schemes: tuple[str, ...] = SCHEMES_OF["canonical"]
    head_multiple = 1
    outputs: tuple[str, ...] = ()
    comparison_note: str | None = None

    def step_inputs(self) -> list[StepInput]:
        """`position_ids` of the new tokens, `write_indices` where they go, `nonpad_kv_seqlen` valid after the step."""
        return [
            StepInput("position_ids", torch.int64, ("batch", "sequence")),
            StepInput("write_indices", torch.int64, ("batch",)),
            StepInput("nonpad_kv_seqlen", torch.int64, ("batch",)),
        ]

    def prefill_inputs(self) -> list[StepInput]:
        """All of them."""
        return self.step_inputs()

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMSNormalization with FP32 statistics (stash_type 1)."""
        return rms_norm(x, weight, epsilon)

    def positions(self, step: Mapping[str, Tensor], sequence: int) -> Tensor:
        """The input of that name."""
        return step["position_ids"]

    def can_rotate_inside(self, rotary: Rotary, head_dim: int) -> bool:
        """It may as well."""
        return True

    def rotate(self, x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
        """RotaryEmbedding, as in front of attention."""
        return rotate(x, rotary, positions)

    def attention(self, call: AttentionCall, step: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate, write into the cache, attend: bottom-right causal, or by an explicit mask where there is a window."""
        refuse_sinks(call, self.name)
        query, key = call.query, call.key
        if call.rotary is not None:
            query, key = (rotate(x, call.rotary, step["position_ids"]) for x in (query, key))
        present_key = scatter(call.past_key, key, step["write_indices"])
        present_value = scatter(call.past_value, call.value, step["write_indices"])
        attrs: Attributes = {"scale": call.scale, "is_causal": int(call.window is None)}
        if call.softcap is not None:
            attrs["softcap"] = call.softcap
        inputs: list[Tensor | None] = [query, present_key, present_value]
        if call.window is None:
            inputs += [None, None, None, step["nonpad_kv_seqlen"]]
        else:
            inputs.append(window_mask(present_key.shape[2], step["position_ids"], call.window))
        output = torch.onnx.ops.symbolic(
            "Attention", inputs, attrs=attrs, dtype=query.dtype, shape=query.shape, version=24
        )
        return merge_heads(output), present_key, present_value

    def experts(self, call: ExpertsCall) -> Tensor:
        """The chosen experts' weights are gathered for each token: exact, and far too much memory for long prompts."""
        tokens, k = call.chosen.shape
        picked = call.chosen.reshape(-1)
        x = call.x.repeat_interleave(k, dim=0)
        x = gate_of(_product(x, call.up, call.up_bias, picked, call.transposed), call.gate)
        x = _product(x, call.down, call.down_bias, picked, call.transposed)
        return (x.reshape(tokens, k, -1) * call.weights[..., None]).sum(dim=1)

    def further_outputs(self, logits: Tensor, step: Mapping[str, Tensor], sequence: int) -> tuple[Tensor, ...]:
        """None."""
        return ()

    def optimize(self, model: ir.Model) -> None:
        """Nothing: the oracle stays as the model was written."""

    def companions(
        self, model: ir.Model, how: BlockQuantization | None, *, all_logits: bool = False
    ) -> list[Companion]:
        """None: every reader of the standard runs the graph itself."""
        return []

    def settings(self, architecture: Architecture, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """None."""
        return {}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, picked: Tensor, transposed: bool) -> Tensor:
    """x [n, in] by the weights of its picked [n] experts, each of its own: [n, out]."""
    weights = weight[picked] if transposed else weight[picked].transpose(1, 2)
    product = (x[:, None, :] @ weights)[:, 0]
    return product if bias is None else product + bias[picked]


def gate_of(x: Tensor, gate: Gate) -> Tensor:
    """What the gate makes of x [..., 2 * width]: [..., width]."""
    half = x.shape[-1] // 2
    gated, value = (x[..., ::2], x[..., 1::2]) if gate.interleaved else (x[..., :half], x[..., half:])
    if gate.limit is not None:
        gated, value = gated.clamp(max=gate.limit), value.clamp(-gate.limit, gate.limit)
    return gated * torch.sigmoid(gate.alpha * gated) * (value + gate.beta)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNormalization with FP32 statistics (stash_type 1)."""
    attrs: Attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
    return torch.onnx.ops.symbolic(
        "RMSNormalization", (x, weight), attrs=attrs, dtype=x.dtype, shape=x.shape, version=23
    )


def rotate(x: Tensor, rotary: Rotary, position_ids: Tensor) -> Tensor:
    """RotaryEmbedding of x [batch, heads, sequence, head_dim] at position_ids [batch, sequence]."""
    dim = 2 * rotary.cos.shape[1]
    attrs: Attributes = {"interleaved": int(rotary.interleaved)}
    if dim != x.shape[-1]:
        attrs["rotary_embedding_dim"] = dim
    return torch.onnx.ops.symbolic(
        "RotaryEmbedding",
        (x, rotary.cos, rotary.sin, position_ids),
        attrs=attrs,
        dtype=x.dtype,
        shape=x.shape,
        version=23,
    )


def refuse_sinks(call: AttentionCall, dialect: str) -> None:
    """Raise UnsupportedModelError where a layer has them."""
    if call.sinks is not None:
        raise UnsupportedModelError(f"attention sinks are not supported in the dialect {dialect}: use --dialect ort")


def scatter(past: Tensor, update: Tensor, write_indices: Tensor) -> Tensor:
    """TensorScatter: `past` [batch, kv_heads, cache, head_dim] with `update` from position write_indices [batch] on."""
    return torch.onnx.ops.symbolic(
        "TensorScatter",
        (past, update, write_indices),
        attrs={"axis": 2},
        dtype=past.dtype,
        shape=past.shape,
        version=24,
    )


def merge_heads(output: Tensor) -> Tensor:
    """[batch, heads, sequence, head_dim] to [batch, sequence, heads * head_dim]."""
    batch, heads, sequence, head_dim = output.shape
    return output.transpose(1, 2).reshape(batch, sequence, heads * head_dim)


def window_mask(cache: int, position_ids: Tensor, window: int) -> Tensor:
    """Boolean [batch, 1, sequence, cache]: a token at position p sees the positions p - window + 1 … p."""
    seen = torch.arange(cache, dtype=torch.int64)[None, None, None, :]
    position = position_ids[:, None, :, None]
    return (seen <= position) & (seen > position - window)
