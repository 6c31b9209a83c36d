"""A decoder layer as the tensorrt dialect writes it, made by hand, to be spoilt one node at a time."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCABULARY = 4, 2, 64, 256, 64
Model = ModelProto


def good_graph() -> Model:
    """One layer in FP16: norm, projections, KV cache update, TRT_Attention, logits."""
    graph = helper.make_graph(
        [
            node("Gather", ["embedding", "input_ids"], "hidden"),
            node("RMSNormalization", ["hidden", "norm_weight"], "normed", axis=-1, epsilon=1e-5, stash_type=1),
            *_heads("query", HEADS),
            *_heads("key", KV_HEADS),
            *_heads("value", KV_HEADS),
            *(
                node("TensorScatter", [f"past_key_values.0.{what}", what, "past_lengths"], f"present.0.{what}", axis=2)
                for what in ("key", "value")
            ),
            node("Shape", ["input_ids"], "ids_shape", start=1),
            node("Add", ["past_lengths", "ids_shape"], "lengths"),
            node("Cast", ["lengths"], "kv_lengths", to=TensorProto.INT32),
            attention(["query", "present.0.key", "present.0.value", "", "", "kv_lengths"], "lower_right"),
            node("Transpose", ["attended"], "by_token", perm=[0, 2, 1, 3]),
            node("Reshape", ["by_token", "merged_shape"], "merged"),
            node("MatMul", ["merged", "head_weight"], "logits"),
        ],
        "layer",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("past_lengths", TensorProto.INT64, ["batch"]),
            *(_cache(f"past_key_values.0.{what}") for what in ("key", "value")),
        ],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", "sequence", VOCABULARY]),
            *(_cache(f"present.0.{what}") for what in ("key", "value")),
        ],
        _weights(),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def node(kind: str, inputs: list[str], output: str, **attributes: object) -> NodeProto:
    """A node called as its output."""
    return helper.make_node(kind, inputs, [output], name=output, **attributes)


def attention(inputs: list[str], kind: str) -> NodeProto:
    """TRT_Attention; its inputs are query, key, value, mask, a scale for quantization, lengths."""
    return helper.make_node("TRT_Attention", inputs, ["attended"], name="attention", causal_kind=kind)


def replace(name: str, *new: NodeProto) -> Callable[[Model], None]:
    """A fault: `new` in the place of the node called `name`."""

    def spoil(model: Model) -> None:
        nodes = list(model.graph.node)
        at = next(index for index, found in enumerate(nodes) if found.name == name)
        nodes[at : at + 1] = new
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    return spoil


def add_input(name: str, *readers: NodeProto) -> Callable[[Model], None]:
    """A fault: one more input of int64 [batch, sequence], and nodes that read it for nobody."""

    def spoil(model: Model) -> None:
        model.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"]))
        model.graph.node.extend(readers)

    return spoil


def half_norm(kind: int, *, cast: bool) -> Callable[[Model], None]:
    """A fault: mean(x²) taken in the 16-bit type `kind`, or squared in it and cast to FP32 too late."""
    mean = ["squared32"] if cast else ["squared"]
    nodes = [
        node("Cast", ["hidden"], "hidden16", to=kind),
        node("Mul", ["hidden16", "hidden16"], "squared"),
        *([node("Cast", ["squared"], "squared32", to=TensorProto.FLOAT)] if cast else []),
        node("ReduceMean", [*mean, "last_axis"], "mean", keepdims=1),
        node("Sqrt", ["mean"], "deviation"),
        node("Cast", ["deviation"], "deviation16", to=TensorProto.FLOAT16),
        node("Div", ["hidden", "deviation16"], "normed"),
    ]
    return replace("normed", *nodes)


def write(model: Model, folder: Path) -> Path:
    """The model as a file."""
    file = folder / "model.onnx"
    onnx.save(model, file)
    return file


def _heads(name: str, heads: int) -> list[NodeProto]:
    """`normed` projected to [batch, heads, sequence, head_dim]."""
    return [
        node("MatMul", ["normed", f"{name}_weight"], f"{name}_flat"),
        node("Reshape", [f"{name}_flat", f"{name}_shape"], f"{name}_heads"),
        node("Transpose", [f"{name}_heads"], name, perm=[0, 2, 1, 3]),
    ]


def _cache(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", KV_HEADS, "cache", HEAD_DIM])


def _weights() -> list[TensorProto]:
    random = np.random.default_rng(0)

    def matrix(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) / 16).astype(np.float16)

    tensors = {
        "embedding": matrix(VOCABULARY, HIDDEN),
        "norm_weight": matrix(HIDDEN),
        "query_weight": matrix(HIDDEN, HEADS * HEAD_DIM),
        "key_weight": matrix(HIDDEN, KV_HEADS * HEAD_DIM),
        "value_weight": matrix(HIDDEN, KV_HEADS * HEAD_DIM),
        "head_weight": matrix(HEADS * HEAD_DIM, VOCABULARY),
        "query_shape": np.array([0, 0, HEADS, HEAD_DIM]),
        "key_shape": np.array([0, 0, KV_HEADS, HEAD_DIM]),
        "value_shape": np.array([0, 0, KV_HEADS, HEAD_DIM]),
        "merged_shape": np.array([0, 0, HEADS * HEAD_DIM]),
        "last_axis": np.array([-1]),
    }
    return [numpy_helper.from_array(array, name) for name, array in tensors.items()]
