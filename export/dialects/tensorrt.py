"""The dialect for TensorRT: the canonical one, with attention in the form that TensorRT honours.

TensorRT drops the lengths of the standard Attention and reads its causal rule from the upper left corner. Its own
`TRT_Attention` keeps both. The operator has no meaning outside TensorRT; `tensorrt_reference` gives it one.
"""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from starling.engine.bundle.model_records import Architecture
from starling.engine.errors import UnsupportedModelError
from starling.engine.names import NEXT_LENGTHS, NEXT_TOKENS, NOISE, PAST_LENGTHS, SCHEMES_OF, TEMPERATURE, TOP_K, TOP_P
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.dialects.canonical import merge_heads, refuse_sinks, rms_norm, rotate, scatter, window_mask
from starling.export.dialects.device_sampling import choose_tokens
from starling.export.dialects.dialect import AttentionCall, Companion, ExpertsCall, Rotary, StepInput
from starling.export.dialects.tensorrt_reference import ATTENTION, CAUSAL, MASKED, reference_graph
from starling.export.dialects.tensorrt_reference import GRAPH_FILE as REFERENCE_FILE
from starling.export.graphs.rewrites import insert_constant, is_embedding, pack_sibling_linears
from starling.export.quantization.blocks import BlockQuantization


class TensorrtDialect:
    """TRT_Attention; all that a step needs to know is computed from `past_lengths`; the choice is in the graph."""

    name = "tensorrt"
    opset = 24
    schemes: tuple[str, ...] = SCHEMES_OF["tensorrt"]
    head_multiple = 1
    outputs: tuple[str, ...] = (NEXT_TOKENS, NEXT_LENGTHS)
    comparison_note: str | None = (
        "compared by the reference graph on ONNX Runtime's CPU, which multiplies matrices in float32; "
        "TensorRT itself was not run"
    )

    def step_inputs(self) -> list[StepInput]:
        """`past_lengths`: valid positions before the step; the rest is for `device_sampling.choose_tokens`."""
        return [
            *self.prefill_inputs(),
            StepInput(TEMPERATURE, torch.float32, ("batch",)),
            StepInput(TOP_K, torch.int64, ("batch",)),
            StepInput(TOP_P, torch.float32, ("batch",)),
            StepInput(NOISE, torch.float32, ("batch", "cache")),
        ]

    def prefill_inputs(self) -> list[StepInput]:
        """`past_lengths`."""
        return [StepInput(PAST_LENGTHS, torch.int64, ("batch",))]

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """RMSNormalization: TensorRT's parser casts to FP32 for the statistics and back before the weight."""
        return rms_norm(x, weight, epsilon)

    def positions(self, step: Mapping[str, Tensor], sequence: int) -> Tensor:
        """Those after the valid ones."""
        return step[PAST_LENGTHS][:, None] + torch.arange(sequence)

    def can_rotate_inside(self, rotary: Rotary, head_dim: int) -> bool:
        """It may as well."""
        return True

    def rotate(self, x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
        """RotaryEmbedding, as in front of attention."""
        return rotate(x, rotary, positions)

    def attention(self, call: AttentionCall, step: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate, write into the cache, attend over the valid positions; a window becomes a mask."""
        refuse_sinks(call, self.name)
        if call.softcap is not None:
            message = "a soft cap of attention scores is not supported in the dialect tensorrt: use --dialect ort"
            raise UnsupportedModelError(message)
        query, key, past_lengths = call.query, call.key, step[PAST_LENGTHS]
        sequence = query.shape[2]
        position_ids = self.positions(step, sequence)
        if call.rotary is not None:
            query, key = (rotate(x, call.rotary, position_ids) for x in (query, key))
        present_key = scatter(call.past_key, key, past_lengths)
        present_value = scatter(call.past_value, call.value, past_lengths)
        mask, domain, causal = None, CAUSAL, "lower_right"  # TensorRT takes a mask or a causal rule, not both
        if call.window is not None:
            # That of an input, the same for every layer, so that one mask serves them all.
            cache = step[NOISE].shape[1] if NOISE in step else call.past_key.shape[2]
            mask, domain, causal = window_mask(cache, position_ids, call.window), MASKED, "none"
        valid = (past_lengths + sequence).to(torch.int32)
        output = torch.onnx.ops.symbolic(
            f"{domain}::{ATTENTION}",
            [query * call.scale, present_key, present_value, mask, None, valid],
            attrs={"causal_kind": causal},
            dtype=query.dtype,
            shape=query.shape,
            version=1,
        )
        return merge_heads(output), present_key, present_value

    def experts(self, call: ExpertsCall) -> Tensor:
        """Refused: TensorRT has no operator that reads the chosen experts alone."""
        raise UnsupportedModelError("mixtures of experts are not supported in the dialect tensorrt: use --dialect ort")

    def further_outputs(self, logits: Tensor, step: Mapping[str, Tensor], sequence: int) -> tuple[Tensor, ...]:
        """The next token, int64 [batch, 1], and the lengths after the step, int64 [batch]."""
        lengths = step[PAST_LENGTHS] + sequence
        uniform = step[NOISE].gather(1, lengths[:, None] - 1)[:, 0]
        tokens = choose_tokens(logits[:, 0], step[TEMPERATURE], step[TOP_K], step[TOP_P], uniform)
        return tokens, lengths

    def optimize(self, model: ir.Model) -> None:
        """Packed projections; token 0 is looked up for the -1 of a failed choice, fed back before the host saw it.

        TensorRT would pack them itself, and then needs half the weights' size more memory for the build.
        """
        pack_sibling_linears(model)
        for node in [node for node in model.graph if is_embedding(node)]:
            ids = node.inputs[0]
            lookup = ir.node("Max", [ids, insert_constant(model.graph, node, [0])])
            model.graph.insert_before(node, lookup)
            node.replace_input_with(0, lookup.outputs[0])

    def companions(
        self, model: ir.Model, how: BlockQuantization | None, *, all_logits: bool = False
    ) -> list[Companion]:
        """The reference graph, in which `TRT_Attention` has a meaning."""
        return [Companion(REFERENCE_FILE, reference_graph(model), "reference_graph", REFERENCE_FILE)]

    def settings(self, architecture: Architecture, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """None."""
        return {}
