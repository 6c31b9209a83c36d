"""Where the time goes: every kernel of a real run is put to the part of the layer that it belongs to."""

from pathlib import Path
from typing import Any

import pytest
from command_line import document

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BundleError
from starling.engine.onnx_bytes import Node, read_nodes
from starling.profiling.operators.layer_parts import (
    ATTENTION,
    EMBEDDING,
    LM_HEAD,
    MLP,
    NORM,
    OTHER,
    SAMPLING,
    LayerParts,
)
from starling.profiling.operators.operator_times import Kernel, group

GATE, DOWN = "model.layers.0.mlp.gate_proj+up_proj.weight_t", "model.layers.0.mlp.down_proj.weight_t"
QKV, OUT = "model.layers.0.self_attn.q_proj+k_proj+v_proj.weight_t", "model.layers.0.self_attn.o_proj.weight_t"


@pytest.fixture(scope="module")
def operators(tiny_bundle: Path) -> Any:
    """The operators of one profile of the tiny bundle."""
    run = ("--prompt-tokens", "24", "--new-tokens", "3", "--repeats", "1", "--batch", "2", "--no-cold-start")
    return document("profile", tiny_bundle, *run, "--operators")["operators"]


def test_every_part_of_a_layer_takes_time_and_nothing_is_left_over(operators: Any) -> None:
    expected = {
        "embedding",
        "norm",
        "attention projections",
        "attention",
        "MLP projections",
        "MLP activation",
        "lm_head",
        "sampling",
    }
    for phase in ("prefill", "decode"):
        assert operators[phase]["parts_ms"].keys() == expected


def test_calls_are_counted_and_times_are_of_the_size_of_the_run(operators: Any, tiny_bundle: Path) -> None:
    layers = Bundle.open(tiny_bundle).architecture.layers
    for phase in ("prefill", "decode"):
        rows = {(row["part"], row["operator"]): row for row in operators[phase]["operators"]}
        assert rows["attention", "GroupQueryAttention"]["calls"] == layers
        assert rows["attention projections", "MatMul"]["calls"] == 2 * layers
        assert rows["MLP projections", "MatMul"]["calls"] == 2 * layers
        assert 0 < sum(row["ms"] for row in rows.values()) < operators[phase]["run_ms"]
        assert operators[phase]["operators_ms"] == pytest.approx(sum(operators[phase]["parts_ms"].values()))


def test_a_node_says_by_its_weight_what_it_is_and_others_by_what_they_lead_to() -> None:
    parts = LayerParts(
        [
            Node("ids", "Max", ("input_ids", "zero"), ("safe",)),
            Node("embed", "Gather", ("model.embed_tokens.weight", "safe"), ("x0",)),
            Node("norm", "RMSNormalization", ("x0", "model.layers.0.input_layernorm.weight"), ("n0",)),
            Node("qkv", "MatMul", ("n0", QKV), ("packed",)),
            Node("reshape", "Reshape", ("packed", "shape"), ("heads",)),
            Node("attention", "Attention", ("heads",), ("attended",)),
            Node("gate_by_head", "Mul", ("attended", "attended"), ("gated",)),
            Node("out", "MatMul", ("gated", OUT), ("o0",)),
            Node("residual", "Add", ("x0", "o0"), ("x1",)),
            Node("norm2", "RMSNormalization", ("x1", "model.norm.weight"), ("n1",)),
            Node("up", "MatMul", ("n1", GATE), ("u",)),
            Node("silu", "Sigmoid", ("u",), ("s",)),
            Node("down", "MatMul", ("s", DOWN), ("d",)),
            Node("last", "Slice", ("d",), ("tail",)),
            Node("head", "MatMul", ("tail", "lm_head.weight_t"), ("logits",)),
            Node("cool", "Div", ("temperature", "one"), ("cold",)),
            Node("choose", "ArgMax", ("logits", "cold"), ("next_tokens",)),
        ]
    )
    found = {name: parts.part(name, "") for name in ("ids", "embed", "reshape", "gate_by_head", "residual", "silu")}
    assert found == {
        "ids": EMBEDDING,
        "embed": EMBEDDING,
        "reshape": ATTENTION,
        "gate_by_head": ATTENTION,
        "residual": NORM,
        "silu": MLP,
    }
    assert [parts.part(name, "") for name in ("last", "head", "cool", "choose")] == [
        LM_HEAD,
        LM_HEAD,
        SAMPLING,
        SAMPLING,
    ]


def test_kernels_that_a_runtime_makes_are_found_by_what_they_were_made_from() -> None:
    parts = LayerParts([Node("silu", "Mul", ("u", "s"), ("act",)), Node("down", "MatMul", ("act", DOWN), ("logits",))])
    assert parts.part("silu/QuickGeluFusion/", "QuickGelu") == MLP
    assert parts.part("InsertedPrecisionFreeCast_act", "Cast") == MLP
    assert parts.part("a fused norm", "SkipSimplifiedLayerNormalization") == NORM
    assert parts.part("unheard of", "Mystery") == OTHER


def test_times_are_those_of_the_median_run_and_calls_of_all_runs() -> None:
    parts = LayerParts([Node("down", "MatMul", ("act", DOWN), ("logits",))])
    runs = [(9.0, [Kernel("down", "MatMul", us)] * 2) for us in (1000.0, 4000.0)] + [(5.0, [])]
    phase = group(runs, parts)
    [row] = phase.operators
    assert (phase.runs, phase.run_ms) == (3, 9.0)
    assert row.ms == 2.0
    assert row.calls == pytest.approx(4 / 3)


def test_operators_add_up_although_each_is_slow_in_other_runs() -> None:
    parts = LayerParts(
        [Node("qkv", "MatMul", ("x", QKV), ("act",)), Node("down", "MatMul", ("act", DOWN), ("logits",))]
    )
    # In two runs of three a product takes 10 ms instead of 1: both medians are 10 ms, of a median run of 12.
    times = [(10.0, 10.0), (10.0, 1.0), (1.0, 10.0)]
    runs = [
        (qkv + down + 1.0, [Kernel("qkv", "MatMul", qkv * 1e3), Kernel("down", "MatMul", down * 1e3)])
        for qkv, down in times
    ]
    phase = group(runs, parts)
    assert (phase.run_ms, phase.operators_ms) == (12.0, pytest.approx(11.0))


def test_the_fastest_and_the_slowest_quarter_of_the_runs_do_not_count() -> None:
    parts = LayerParts([Node("down", "MatMul", ("act", DOWN), ("logits",))])
    runs = [(ms, [Kernel("down", "MatMul", us)]) for ms, us in ((1.0, 900.0), (4.0, 1e3), (6.0, 3e3), (90.0, 89e3))]
    phase = group(runs, parts)
    assert phase.run_ms == 5.0
    assert phase.operators_ms == pytest.approx(5.0 * (1 / 4 + 3 / 6) / 2)


def test_nodes_are_read_as_the_onnx_package_reads_them(tiny_bundle: Path) -> None:
    import onnx

    file = Bundle.open(tiny_bundle).graph_path
    theirs = [
        Node(node.name, node.op_type, tuple(node.input), tuple(node.output))
        for node in onnx.load(file, load_external_data=False).graph.node
    ]
    assert read_nodes(file) == theirs


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\x0f\xff\xff\xff")
    with pytest.raises(BundleError, match="is not an ONNX file"):
        read_nodes(tmp_path / "model.onnx")
