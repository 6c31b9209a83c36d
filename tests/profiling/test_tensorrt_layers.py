"""What TensorRT calls its layers is led back to the nodes of the graph, and so to the parts of the decoder."""

from pathlib import Path

import pytest

from starling.engine.backends.tensorrt.build.network import parse_graph
from starling.engine.backends.tensorrt.runtimes import layers_of, load_library
from starling.engine.bundle.manifest import Bundle
from starling.engine.onnx_bytes import Node, read_nodes
from starling.profiling.operators.layer_parts import (
    ATTENTION,
    ATTENTION_PROJECTIONS,
    LM_HEAD,
    MLP,
    MLP_PROJECTIONS,
    NORM,
    OTHER,
    SAMPLING,
)
from starling.profiling.operators.tensorrt_layers import TensorRTLayers

# One layer of a decoder as the exporter names its nodes.
NODES = [
    Node("node_RMSNormalization_1", "RMSNormalization", ("x", "model.layers.0.input_layernorm.weight"), ("n",)),
    Node("node_MatMul_20", "MatMul", ("n", "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight_t"), ("qkv",)),
    Node("node_view_3", "Reshape", ("qkv", "shape"), ("heads",)),
    Node("node_RotaryEmbedding_4", "RotaryEmbedding", ("heads",), ("turned",)),
    Node("node_mul_5", "Mul", ("turned", "scale"), ("query",)),
    Node("node__symbolic_6", "TRT_Attention", ("query",), ("attended",)),
    Node("node_view_7", "Reshape", ("attended", "flat"), ("merged",)),
    Node("node_MatMul_21", "MatMul", ("merged", "model.layers.0.self_attn.o_proj.weight_t"), ("o",)),
    Node("node_add_8", "Add", ("x", "o"), ("x1",)),
    Node(
        "node_RMSNormalization_9", "RMSNormalization", ("x1", "model.layers.0.post_attention_layernorm.weight"), ("m",)
    ),
    Node("node_DequantizeLinear_10", "DequantizeLinear", ("model.layers.0.mlp.gate_proj+up_proj.weight_q8",), ("w",)),
    Node("node_MatMul_22", "MatMul", ("m", "w"), ("gu",)),
    Node("node_Split_11", "Split", ("gu",), ("g", "u")),
    Node("node_Sigmoid_12", "Sigmoid", ("g",), ("s",)),
    Node("node_silu", "Mul", ("g", "s"), ("silu",)),
    Node("node_mul_13", "Mul", ("silu", "u"), ("act",)),
    Node("node_MatMul_23", "MatMul", ("act", "model.layers.0.mlp.down_proj.weight_t"), ("d",)),
    Node("node_MatMul_24", "MatMul", ("d", "lm_head.weight_t"), ("logits",)),
    Node("node_argmax", "ArgMax", ("logits",), ("next_tokens",)),
]


@pytest.fixture(scope="module")
def layers() -> TensorRTLayers:
    return TensorRTLayers(NODES)


@pytest.mark.parametrize(
    ("layer", "part", "operator"),
    [
        pytest.param("node_MatMul_20", ATTENTION_PROJECTIONS, "MatMul", id="a node"),
        pytest.param("node_MatMul_22", MLP_PROJECTIONS, "MatMul", id="a node with a quantized weight"),
        pytest.param("node_MatMul_20 [profile 1]", ATTENTION_PROJECTIONS, "MatMul", id="second profile"),
        pytest.param("node_MatMul_23_myl0_17", MLP_PROJECTIONS, "MatMul", id="compiled for one node"),
        pytest.param("node_RMSNormalization_9_castHelper_31", NORM, "RMSNormalization", id="made beside a node"),
        pytest.param("node_mul_5 + node__symbolic_6", ATTENTION, "Mul+TRT_Attention", id="fused"),
        pytest.param("node_view_7 + node_MatMul_21", ATTENTION_PROJECTIONS, "Reshape+MatMul", id="the product's"),
        pytest.param(
            "node_DequantizeLinear_10 + node_MatMul_22", MLP_PROJECTIONS, "DequantizeLinear+MatMul", id="q/dq"
        ),
        pytest.param("PWN(PWN(node_Sigmoid_12, node_silu), node_mul_13)", MLP, "Sigmoid+Mul", id="pointwise"),
        pytest.param("[ONNX Layer: node__symbolic_6][ONNX Layer: node_mul_5]", ATTENTION, "TRT_Attention+Mul", id="["),
        pytest.param("(Unnamed Layer* 12) [Shuffle] + node_MatMul_24", LM_HEAD, "MatMul", id="after an unnamed one"),
        pytest.param("Reformatting CopyNode for Input Tensor 0 to node_MatMul_24", LM_HEAD, "Reformat", id="reformat"),
        pytest.param(
            "Reformatting CopyNode for Input Tensor 1 to {ForeignNode[node_argmax...node_argmax]}",
            SAMPLING,
            "Reformat",
            id="reformat before a region",
        ),
    ],
)
def test_a_layer_belongs_to_the_nodes_in_its_name(layers: TensorRTLayers, layer: str, part: str, operator: str) -> None:
    assert (layers.part(layer, operator), layers.operator(layer)) == (part, operator)


@pytest.mark.parametrize(
    ("region", "part"),
    [
        pytest.param("{ForeignNode[node_view_3...node__symbolic_6]}", ATTENTION, id="one part"),
        pytest.param(
            "{ForeignNode[node_mul_5 + node__symbolic_6...node_view_7]} [profile 1]", ATTENTION, id="fused ends"
        ),
        pytest.param("{ForeignNode[node_MatMul_22...node_MatMul_23]}", MLP_PROJECTIONS, id="an MLP"),
        pytest.param("{ForeignNode[node_RMSNormalization_1...node_RMSNormalization_9]}", OTHER, id="nearly a layer"),
        pytest.param("{ForeignNode[node_MatMul_20...node_MatMul_21]}", OTHER, id="projections and attention"),
        pytest.param("{ForeignNode[node_RMSNormalization_1...node_argmax]}", OTHER, id="everything"),
        pytest.param("{ForeignNode[(Unnamed Layer* 3) [Shuffle]...node_MatMul_23]}", OTHER, id="an end unknown"),
    ],
)
def test_a_region_belongs_to_the_part_of_all_between_its_ends(layers: TensorRTLayers, region: str, part: str) -> None:
    assert (layers.part(region, "ForeignNode"), layers.operator(region)) == (part, "ForeignNode")


@pytest.mark.parametrize(
    ("layer", "part", "operator"),
    [
        ("_gemm_mha_v2_myl0_172", ATTENTION, "gemm_mha_v2"),
        ("__myl_SiluMul_myl0_8", MLP, "SiluMul"),
        ("__myl_CastMulMeanAddSqrtDivMulCastMul_myl1_2 [profile 1]", NORM, "CastMulMeanAddSqrtDivMulCastMul"),
        ("__myl_TranReshMove_myl3_5", OTHER, "TranReshMove"),
        ("(Unnamed Layer* 3274) [Shuffle]", OTHER, "Shuffle"),
        ("node_MatMul_999", OTHER, "node_MatMul"),
        ("ONNXTRT_castHelper_31", OTHER, "ONNXTRT_castHelper"),
        ("[trainStation12]", OTHER, "[trainStation]"),
    ],
)
def test_a_layer_that_names_no_node_goes_by_what_it_computes(
    layers: TensorRTLayers, layer: str, part: str, operator: str
) -> None:
    assert (layers.part(layer, operator), layers.operator(layer)) == (part, operator)


def test_every_layer_that_the_parser_makes_of_a_node_is_found(tiny_tensorrt_bundle: Path) -> None:
    """All but constants, and the ONNXTRT_ ones beside them that compute shapes, broadcast or cast."""
    bundle = Bundle.open(tiny_tensorrt_bundle)
    nodes = read_nodes(bundle.graph_path)
    assert len({node.name for node in nodes}) == len(nodes)
    assert all(node.name for node in nodes)
    layers = TensorRTLayers(nodes)
    parsed = parse_graph(load_library("tensorrt-rtx"), bundle.graph_path, max_seq=128, window=None)
    named = [layer.name for layer in layers_of(parsed.network) if layer.type.name != "CONSTANT"]
    names = [name for name in named if not name.startswith("ONNXTRT_")]
    assert len(names) > 100
    lost = [name for name in names if layers.part(name, layers.operator(name)) == OTHER]
    assert lost == []
