"""A network that would not mean what the model means is refused by name before it is built."""

import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from families import Family, random_folder
from onnx import ModelProto, TensorProto, helper
from tensorrt_graphs import add_input, attention, good_graph, half_norm, node, replace, write

from starling.engine.backends.tensorrt.build.graph_edits import drop_window_masks, set_dimension
from starling.engine.backends.tensorrt.build.network import ParsedNetwork, parse_graph
from starling.engine.backends.tensorrt.build.network_checks import check_network
from starling.engine.backends.tensorrt.build.optimization_profiles import add_profiles, make_profiles
from starling.engine.backends.tensorrt.runtimes import Library, layers_of, load_library
from starling.engine.errors import BuildError
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="NVIDIA has no TensorRT for macOS")

MAX_SEQ = 128
QUERY, CACHES, LENGTHS = "query", ["present.0.key", "present.0.value"], "kv_lengths"
SCATTERED = ["past_key_values.0.key", "key", "past_lengths"]


@pytest.fixture(scope="module")
def library() -> Library:
    """TensorRT for RTX."""
    return load_library("tensorrt-rtx")


def parse(library: Library, model: ModelProto, folder: Path, *, window: int | None = None) -> ParsedNetwork:
    return parse_graph(library, write(model, folder), max_seq=MAX_SEQ, window=window)


def test_a_good_network_passes_and_its_caches_are_found(library: Library, tmp_path: Path) -> None:
    facts = check_network(library, parse(library, good_graph(), tmp_path).network)
    assert facts.aliases == (
        ("past_key_values.0.key", "present.0.key"),
        ("past_key_values.0.value", "present.0.value"),
    )
    assert (facts.layers["ATTENTION_INPUT"], facts.layers["KV_CACHE_UPDATE"]) == (1, 2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(add_input("position_ids"), "input position_ids is not used", id="unused"),
        pytest.param(
            add_input("position_ids", node("Neg", ["position_ids"], "nobody_reads_this")),
            "input position_ids is not used",
            id="used for nothing",
        ),
        pytest.param(
            replace("attention", attention([QUERY, *CACHES, "", "", LENGTHS], "upper_left")),
            "attention attention is causal to the upper left",
            id="upper left",
        ),
        pytest.param(
            replace("attention", attention([QUERY, *CACHES, "", "", LENGTHS], "none")),
            "attention attention is neither causal nor masked",
            id="not causal",
        ),
        pytest.param(
            replace("attention", attention([QUERY, *CACHES], "lower_right")),
            "attention attention has no key_value_lengths",
            id="no lengths",
        ),
        pytest.param(
            replace(
                "present.0.key",
                node("TensorScatter", SCATTERED, "scattered", axis=2),
                node("Neg", ["scattered"], "present.0.key"),
            ),
            "cache past_key_values.0.key is not aliased; cache present.0.key is not aliased",
            id="cache copied",
        ),
        pytest.param(
            replace("present.0.key", node("Neg", ["past_key_values.0.key"], "present.0.key")),
            "cache past_key_values.0.key is not aliased: no KV cache update writes it",
            id="no cache update",
        ),
        pytest.param(
            replace(
                "present.0.key",
                node("TensorScatter", ["past_key_values.0.value", *SCATTERED[1:]], "present.0.key", axis=2),
            ),
            "input past_key_values.0.key is not used",
            id="wrong cache",
        ),
        pytest.param(half_norm(TensorProto.FLOAT16, cast=False), "norm statistics of mean are FP16", id="norm in FP16"),
        pytest.param(
            half_norm(TensorProto.BFLOAT16, cast=False), "norm statistics of mean are BF16", id="norm in BF16"
        ),
        pytest.param(half_norm(TensorProto.FLOAT16, cast=True), "are FP16 (squared), not FP32", id="square in FP16"),
    ],
)
def test_a_network_that_would_mean_something_else_is_refused(
    spoil: Callable[[ModelProto], None], message: str, library: Library, tmp_path: Path
) -> None:
    model = good_graph()
    spoil(model)
    with pytest.raises(BuildError) as refused:
        check_network(library, parse(library, model, tmp_path).network)
    line = str(refused.value)
    assert line.startswith("the network would not mean what the model means: ")
    for part in message.split("; "):
        assert part in line
    assert line.endswith("export the model with --dialect tensorrt")


def test_the_canonical_graph_is_refused(tiny_checkpoint: Checkpoint, library: Library, tmp_path: Path) -> None:
    """TensorRT takes it without an error and would attend to the first token only."""
    llama = random_folder(Family("llama", "llama"), tiny_checkpoint, tmp_path / "llama")
    export_bundle(
        open_checkpoint(str(llama)), tmp_path / "out", ExportOptions(dialect="canonical", dtype="fp16", check=False)
    )
    parsed = parse_graph(library, tmp_path / "out" / "model.onnx", max_seq=MAX_SEQ, window=None)
    with pytest.raises(BuildError) as refused:
        check_network(library, parsed.network)
    assert "input nonpad_kv_seqlen is not used" in str(refused.value)
    assert "is causal to the upper left: a decode step would see the first position only" in str(refused.value)
    assert "has no key_value_lengths" in str(refused.value)


def test_the_canonical_graph_with_a_window_is_refused(
    tiny_checkpoint: Checkpoint, library: Library, tmp_path: Path
) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "out", ExportOptions(dialect="canonical", dtype="fp16", check=False))
    parsed = parse_graph(library, tmp_path / "out" / "model.onnx", max_seq=MAX_SEQ, window=4096)
    with pytest.raises(BuildError, match=r"input nonpad_kv_seqlen is not used; attention \S+ has no key_value_lengths"):
        check_network(library, parsed.network)


def windowed_graph() -> ModelProto:
    """The good graph with a window of 64 positions by a mask."""
    model = good_graph()
    replace(
        "attention",
        node("Shape", ["present.0.key"], "cache_length", start=2, end=3),
        node("Squeeze", ["cache_length"], "cache_size"),
        node("Range", ["zero", "cache_size", "one"], "seen"),
        node("Sub", ["lengths", "window"], "first"),
        node("Reshape", ["first", "per_row"], "first_seen"),
        node("Greater", ["seen", "first_seen"], "mask_of_row"),
        node("Concat", ["ones", "ids_shape", "cache_length"], "mask_shape", axis=0),
        node("Expand", ["mask_of_row", "mask_shape"], "mask"),
        attention([QUERY, *CACHES, "mask", "", LENGTHS], "none"),
    )(model)
    for name, value in {"zero": 0, "one": 1, "window": 64, "per_row": [-1, 1, 1, 1], "ones": [1, 1]}.items():
        shape = [len(value)] if isinstance(value, list) else []
        values = value if isinstance(value, list) else [value]
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, shape, values))
    return model


def masks(library: Library, parsed: ParsedNetwork) -> list[tuple[str, bool]]:
    found = []
    for layer in layers_of(parsed.network):
        if layer.type.name == "ATTENTION_INPUT":
            attended = library.as_kind(layer, "IAttentionInputLayer").attention
            found.append((attended.causal_kind.name, attended.mask is not None))
    return found


def test_a_window_that_no_sequence_outgrows_is_left_out(library: Library, tmp_path: Path) -> None:
    kept = parse(library, windowed_graph(), tmp_path, window=MAX_SEQ - 1)
    assert masks(library, kept) == [("NONE", True)]
    check_network(library, kept.network)
    dropped = parse(library, windowed_graph(), tmp_path, window=MAX_SEQ)
    assert masks(library, dropped) == [("LOWER_RIGHT", False)]
    check_network(library, dropped.network)


def test_edits_change_what_they_name_and_nothing_else() -> None:
    model = windowed_graph()
    content = model.SerializeToString()
    sized = onnx.load_from_string(set_dimension(content, "cache", 300))
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*sized.graph.input, *sized.graph.output)}
    assert shapes["past_key_values.0.key"][2].dim_value == shapes["present.0.value"][2].dim_value == 300
    assert shapes["input_ids"][1].dim_param == "sequence"
    for value in (*sized.graph.input, *sized.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_value == 300:
                dimension.dim_param = "cache"
    assert sized == model
    assert set_dimension(content, "caches", 300) == content

    plain = onnx.load_from_string(drop_window_masks(content))
    [attended] = [found for found in plain.graph.node if found.op_type == "TRT_Attention"]
    assert list(attended.input) == [QUERY, *CACHES, "", "", LENGTHS]
    assert attended.attribute[0] == helper.make_attribute("causal_kind", "lower_right")
    replace("attention", attention([QUERY, *CACHES, "mask", "", LENGTHS], "none"))(plain)
    assert plain == model
    without = good_graph().SerializeToString()
    assert drop_window_masks(without) == without


@pytest.mark.parametrize("keep", [0.3, 0.999])
def test_a_file_that_is_no_graph(keep: float, library: Library, tmp_path: Path) -> None:
    file = write(good_graph(), tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(BuildError, match=r"model\.onnx is no ONNX file \(.*\); export the model again"):
        parse_graph(library, file, max_seq=MAX_SEQ, window=None)


def test_what_tensorrt_cannot_parse_is_named(library: Library, tmp_path: Path) -> None:
    model = good_graph()
    replace("normed", helper.make_node("Frobnicate", ["hidden"], ["normed"], name="odd_one", domain="nowhere"))(model)
    with pytest.raises(BuildError, match=r"TensorRT for RTX [0-9.]+ cannot parse .*model\.onnx: Frobnicate odd_one: "):
        parse(library, model, tmp_path)


def test_a_long_cache_allows_two_tokens_in_a_decode_step(library: Library, tmp_path: Path) -> None:
    length = 24576
    parsed = parse_graph(library, write(good_graph(), tmp_path), max_seq=length, window=None)
    profiles = make_profiles(parsed.network, max_batch=1, max_prefill=64, max_seq=length)
    assert profiles[1].shapes["input_ids"].max == (2, 2)
    config = parsed.builder.create_builder_config()
    library.set_targets(config, ["sm89"])
    add_profiles(parsed.builder, config, profiles)
    assert parsed.builder.build_serialized_network(parsed.network, config) is not None, library.last_message()


def test_a_dynamic_dimension_that_no_profile_knows(library: Library, tmp_path: Path) -> None:
    model = good_graph()
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "rows"
    parsed = parse(library, model, tmp_path)
    with pytest.raises(BuildError, match="input past_lengths has the dynamic dimension 'rows', and no profile gives"):
        make_profiles(parsed.network, max_batch=1, max_prefill=1, max_seq=MAX_SEQ)
