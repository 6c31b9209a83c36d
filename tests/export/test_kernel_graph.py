"""The graph for the CPU kernels: which weights it takes into them, and that it computes what they stand for."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from starling.engine.kernels import kernel_library, require_kernel_library
from starling.export.graphs.kernel_graph import kernel_graph
from starling.export.quantization.blocks import BlockQuantization, quantize_rows

torch = pytest.importorskip("torch")

WIDTH, MIDDLE, OUT = 64, 96, 40
Floats = NDArray[np.float32]


def mixed_model(how: BlockQuantization, of_head: BlockQuantization) -> tuple[onnx.ModelProto, Floats, Floats]:
    """Two products with a norm between, each quantized its own way; and their weights [out, in] as they are read."""
    first, of_first, weight = _product("first", "x", MIDDLE, WIDTH, how)
    second, of_second, head = _product("second", "normed", OUT, MIDDLE, of_head)
    norm = helper.make_node(
        "SimplifiedLayerNormalization", ["first", "norm"], ["normed"], axis=-1, epsilon=1e-5, stash_type=1
    )
    graph = helper.make_graph(
        [first, norm, second],
        "mixed",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "tokens", WIDTH])],
        [helper.make_tensor_value_info("second", TensorProto.FLOAT, [1, "tokens", OUT])],
        [*of_first, *of_second, numpy_helper.from_array(np.ones(MIDDLE, np.float32), "norm")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), weight, head


def _product(
    name: str, x: str, rows: int, columns: int, how: BlockQuantization
) -> tuple[onnx.NodeProto, list[onnx.TensorProto], Floats]:
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=generator) + 0.5  # so that zero points are not the middle
    data, scales, zeros = (part.numpy() for part in quantize_rows(weight, how))
    names = [f"{name}_data", f"{name}_scales", f"{name}_zeros"]
    arrays = [data, scales, zeros.reshape(rows, -1)]
    node = helper.make_node(
        "MatMulNBits",
        [x, *names],
        [name],
        domain="com.microsoft",
        K=columns,
        N=rows,
        bits=how.bits,
        block_size=how.block_size,
        accuracy_level=4,
    )
    initializers = [numpy_helper.from_array(array, each) for array, each in zip(arrays, names, strict=True)]
    return node, initializers, _read(data, scales, zeros, how)


def _read(data: NDArray[np.uint8], scales: Floats, zeros: NDArray[np.uint8], how: BlockQuantization) -> Floats:
    if how.bits == 4:
        data, zeros = (
            np.stack((part & 15, part >> 4), axis=-1).reshape(*part.shape[:-1], -1) for part in (data, zeros)
        )
    numbers = data.astype(np.float32) - zeros[:, : data.shape[1], None]
    return np.asarray((numbers * scales[..., None]).reshape(len(data), -1))


def run(model: onnx.ModelProto, x: Floats) -> Floats:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(require_kernel_library().path))
    return np.asarray(ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0])


@pytest.mark.skipif(kernel_library() is None, reason="the CPU kernels are not built on this machine")
@pytest.mark.parametrize("symmetric", [False, True])
def test_products_of_int4_and_int8_in_one_graph_are_both_taken(symmetric: bool) -> None:
    how = BlockQuantization("int4", symmetric=symmetric)
    plain, weight, head = mixed_model(how, BlockQuantization("int8"))
    twin = kernel_graph(ir.from_proto(plain), how)
    assert twin is not None
    products = [node for node in twin.graph if node.op_type == "QuantizedLinear"]
    assert [node.attributes["bits"].as_int() for node in products] == [4, 8]
    assert not [node for node in twin.graph if node.op_type == "MatMulNBits"]
    x = np.random.default_rng(0).standard_normal((1, 7, WIDTH)).astype(np.float32)
    middle = x @ weight.T
    expected = middle / np.sqrt((middle**2).mean(-1, keepdims=True) + 1e-5) @ head.T
    ours, theirs = run(ir.to_proto(twin), x), run(plain, x)
    assert np.abs(ours - expected).max() < 0.03 * expected.std()
    assert np.abs(ours - expected).max() < 2 * np.abs(theirs - expected).max()


def test_int8_with_zero_points_is_left_to_onnx_runtime() -> None:
    how = BlockQuantization("int8", symmetric=False)
    plain, _, _ = mixed_model(how, how)
    twin = kernel_graph(ir.from_proto(plain), how)
    assert twin is None or not [node for node in twin.graph if node.op_type == "QuantizedLinear"]
