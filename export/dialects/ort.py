"""The serving dialect for ONNX Runtime: GroupQueryAttention, rotary inside, past and present in one buffer."""

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from starling.engine.bundle.model_records import Architecture
from starling.engine.names import LOGITS, LOGITS_TO_KEEP, NEXT_TOKENS, SCHEMES_OF, SEQLENS_K, TOTAL_SEQUENCE_LENGTH
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.dialects.dialect import AttentionCall, Attributes, Companion, ExpertsCall, Rotary, StepInput
from starling.export.graphs import cuda_graph, genai
from starling.export.graphs.kernel_graph import GRAPH_FILE as KERNEL_GRAPH_FILE
from starling.export.graphs.kernel_graph import kernel_graph
from starling.export.graphs.rewrites import fuse_residual_norms, pack_attention_inputs, pack_sibling_linears
from starling.export.quantization.blocks import BlockQuantization

_HEAD_SINK = 11  # the input's index
_NEVER = -30000.0  # the logit of an expert that was not chosen: float16 holds it, and its exponential is zero


class OrtDialect:
    """com.microsoft contrib operators. GroupQueryAttention's cost follows the live length, not the buffer's."""

    name = "ort"
    opset = 21
    schemes: tuple[str, ...] = SCHEMES_OF["ort"]
    head_multiple = 8
    outputs: tuple[str, ...] = (NEXT_TOKENS,)
    comparison_note: str | None = None

    def step_inputs(self) -> list[StepInput]:
        """`seqlens_k`: valid tokens per row after the step, minus one; `total_sequence_length`: the longest row's.

        `logits_to_keep`: which of the new tokens get logits.
        """
        return [*self.prefill_inputs(), StepInput(LOGITS_TO_KEEP, torch.int64, ("kept",))]

    def prefill_inputs(self) -> list[StepInput]:
        """The lengths."""
        return [
            StepInput(SEQLENS_K, torch.int32, ("batch",)),
            StepInput(TOTAL_SEQUENCE_LENGTH, torch.int32, ()),
        ]

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """SimplifiedLayerNormalization: ONNX Runtime's RMSNorm with FP32 statistics."""
        attrs: Attributes = {"axis": -1, "epsilon": epsilon, "stash_type": 1}
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization", (x, weight), attrs=attrs, dtype=x.dtype, shape=x.shape, version=1
        )

    def positions(self, step: Mapping[str, Tensor], sequence: int) -> Tensor:
        """The last `sequence` of each row's valid ones."""
        return step[SEQLENS_K].to(torch.int64)[:, None] + 1 - sequence + torch.arange(sequence)

    def can_rotate_inside(self, rotary: Rotary, head_dim: int) -> bool:
        """GroupQueryAttention rotates heads of a multiple of 16 channels, and a multiple of 16 of those."""
        return head_dim % 16 == 0 and rotary.cos.shape[1] % 8 == 0

    def rotate(self, x: Tensor, rotary: Rotary, positions: Tensor) -> Tensor:
        """com.microsoft RotaryEmbedding, which also takes the channels beyond the table's and leaves them alone."""
        attrs: Attributes = {"interleaved": int(rotary.interleaved)}
        if (dim := 2 * rotary.cos.shape[1]) != x.shape[-1]:
            attrs |= {"rotary_embedding_dim": dim, "num_heads": x.shape[1]}
        inputs = (x, positions, rotary.cos, rotary.sin)
        return torch.onnx.ops.symbolic(
            "com.microsoft::RotaryEmbedding", inputs, attrs=attrs, dtype=x.dtype, shape=x.shape, version=1
        )

    def attention(self, call: AttentionCall, step: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One GroupQueryAttention node; query, key and value as [batch, sequence, heads * head_dim]."""
        batch, heads, sequence, head_dim = call.query.shape
        query, key, value = (
            x.transpose(1, 2).reshape(batch, sequence, x.shape[1] * head_dim)
            for x in (call.query, call.key, call.value)
        )
        attrs: Attributes = {"num_heads": heads, "kv_num_heads": call.key.shape[1], "scale": call.scale}
        if call.window is not None:
            attrs["local_window_size"] = call.window
        inputs: list[Tensor | None] = [query, key, value, call.past_key, call.past_value]
        inputs += [step[SEQLENS_K], step[TOTAL_SEQUENCE_LENGTH]]
        if call.rotary is not None:
            attrs |= {"do_rotary": 1, "rotary_interleaved": int(call.rotary.interleaved)}
            inputs += [call.rotary.cos, call.rotary.sin]
        if call.softcap is not None:
            attrs["softcap"] = call.softcap
        if call.sinks is not None:
            inputs += [None] * (_HEAD_SINK - len(inputs)) + [call.sinks]
        output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attrs=attrs,
            dtypes=(query.dtype, key.dtype, value.dtype),
            shapes=(query.shape, call.past_key.shape, call.past_value.shape),
            version=1,
        )
        return output, present_key, present_value

    def experts(self, call: ExpertsCall) -> Tensor:
        """An abstract node, later MoE or QMoE. Those choose and weigh by a softmax of logits of their own.

        So each token's chosen experts get the logarithms of their weights, the others nothing; what the softmax makes
        of them is the weights over their sum, which is multiplied in again.
        """
        smallest = torch.finfo(call.weights.dtype).tiny
        logits = torch.full((call.x.shape[0], call.up.shape[0]), _NEVER, dtype=call.x.dtype)
        logits = logits.scatter(1, call.chosen, call.weights.clamp(min=smallest).log().to(call.x.dtype))
        biases = [] if call.up_bias is None or call.down_bias is None else [call.up_bias, call.down_bias]
        attrs: Attributes = {
            "k": call.chosen.shape[-1],
            "alpha": call.gate.alpha,
            "beta": call.gate.beta,
            "limit": call.gate.limit or 0.0,
            "interleaved": int(call.gate.interleaved),
            "transposed": int(call.transposed),
        }
        inputs = [call.x, logits, call.up, call.down, *biases]
        output = torch.onnx.ops.symbolic(
            "starling::Experts", inputs, attrs=attrs, dtype=call.x.dtype, shape=call.x.shape, version=1
        )
        return output * call.weights.sum(dim=-1, keepdim=True).to(call.x.dtype)

    def further_outputs(self, logits: Tensor, step: Mapping[str, Tensor], sequence: int) -> tuple[Tensor, ...]:
        """The greedy choice, int64 [batch, kept]: the token with the greatest logit, chosen where the logits are."""
        scores = logits.float() if logits.dtype is torch.bfloat16 else logits  # ArgMax has no kernel for bfloat16
        return (scores.argmax(dim=-1),)

    def optimize(self, model: ir.Model) -> None:
        """Fewer, larger operators: packed projections, add + norm in one."""
        pack_sibling_linears(model)
        pack_attention_inputs(model)
        fuse_residual_norms(model)

    def companions(
        self, model: ir.Model, how: BlockQuantization | None, *, all_logits: bool = False
    ) -> list[Companion]:
        """For onnxruntime-genai, the engine's CPU kernels, CUDA, and the engine's CUDA kernels, where they fit.

        Of a graph that gives no logits the CPU kernels' alone.
        """
        generates = any(output.name == LOGITS for output in model.graph.outputs)
        found = [Companion(genai.GRAPH_FILE, genai.genai_graph(model, all_logits=all_logits))] if generates else []
        if (for_kernels := kernel_graph(model, how)) is not None:
            found.append(Companion(KERNEL_GRAPH_FILE, for_kernels, "kernel_graph", KERNEL_GRAPH_FILE))
        if not generates:
            return found
        if (for_cuda := cuda_graph.cuda_graph(model, how)) is not None:
            found.append(Companion(cuda_graph.GRAPH_FILE, for_cuda, "cuda_graph", cuda_graph.GRAPH_FILE))
        if (kernels := cuda_graph.cuda_kernel_graph(model, how)) is not None:
            file = cuda_graph.KERNEL_GRAPH_FILE
            found.append(Companion(file, kernels[0], "cuda_kernels", {"graph": file, "products": kernels[1]}))
        return found

    def settings(self, architecture: Architecture, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """Those of onnxruntime-genai, which generates text only."""
        if checkpoint.task != "generate":
            return {}
        return {"genai_config.json": genai.genai_config(architecture, checkpoint)}
