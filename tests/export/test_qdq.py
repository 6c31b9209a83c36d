"""Explicit Q/DQ: the numbers of every scheme against a twin in PyTorch, and the graph that holds them."""

import json
import tempfile
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from families import Family, random_folder

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError
from starling.engine.verification import compared_positions
from starling.export.check.parity import bundle_logits
from starling.export.check.torch_reference import load_reference, reference_logits
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.graphs.projections import write_projections
from starling.export.quantization.calibration_choice import Calibration
from starling.export.quantization.qdq_projections import InputPlan, QdqPlan
from starling.export.quantization.qdq_scheme import (
    FP8,
    INT4,
    INT8,
    Grid,
    pack_int4,
    quantize_weight,
    round_to_grid,
    weight_scales,
)
from starling.export.quantization.qdq_settings import QdqQuantization
from starling.export.weights.weight_file import write_weights
from starling.export.weights.weight_plan import Rows, new_weight
from starling.export.weights.weight_source import WeightSource

pytestmark = pytest.mark.slow

FEW = Calibration(tokens=512)


def options(how: QdqQuantization, dtype: str = "fp32", *, check: bool = False) -> ExportOptions:
    return ExportOptions(
        dialect="tensorrt", dtype=dtype, quantization=how, calibration=FEW, check=check, accept_quality=True
    )


def stored(folder: Path) -> dict[str, np.ndarray]:
    """Every initializer of the graph, read by onnx's own reader."""
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("grid", "steps"), [(INT8, 0.51), (INT4, 0.51), (FP8, 0.51)])
@pytest.mark.parametrize("block", [None, 16])
def test_every_weight_is_within_half_a_step(grid: Grid, steps: float, block: int | None, dtype: torch.dtype) -> None:
    rows = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    rows[3] = 0
    scales = weight_scales(rows, grid, block, dtype)
    back = quantize_weight(rows, scales, grid).float() * scales.float().repeat_interleave(64 // scales.shape[1], dim=1)
    # float8 has 3 bits after the leading one: a step is an eighth of the value's power of two
    step = rows.abs() / 8 if grid is FP8 else scales.float().repeat_interleave(64 // scales.shape[1], dim=1)
    tiny = 2**-9 * scales.float().max() if grid is FP8 else 1e-6
    rounding = torch.finfo(dtype).eps * rows.abs()  # of the scale itself, at the very ends of the range
    assert ((back - rows).abs() <= steps * step + tiny + rounding).all()
    assert (back[3] == 0).all()


def test_int4_packs_the_first_value_low() -> None:
    values = torch.tensor([[1, -2, 7], [-8, 0, 3]], dtype=torch.int8)
    assert pack_int4(values).tolist() == [0x1 | 0xE << 4, 0x7 | 0x8 << 4, 0x0 | 0x3 << 4]


@pytest.mark.parametrize(
    ("how", "dtype", "stored_type"),
    [
        (QdqQuantization("int8"), "fp16", np.int8),
        (QdqQuantization("int8", block_size=64), "fp32", np.int8),
        (QdqQuantization("int4"), "fp16", None),
        (QdqQuantization("w8a8"), "fp16", np.int8),
        (QdqQuantization("fp8"), "fp16", None),
    ],
    ids=lambda value: getattr(value, "scheme", None),
)
def test_what_is_stored_gives_the_checkpoints_weights_back(
    how: QdqQuantization, dtype: str, stored_type: type | None, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "b", options(how if how.smoothing is None else unsmoothed(how), dtype))
    tensors = stored(tmp_path / "b")
    name = "model.layers.1.mlp.down_proj.weight"
    data = tensors[f"{name}_{how.weights.stored.name.lower()}"]
    scales = tensors[f"{name}_scales"].astype(np.float32)
    if stored_type is not None:
        assert data.dtype == stored_type
    columns, rows = data.shape
    blocks = scales.reshape(-1, rows)
    back = data.astype(np.float32).reshape(len(blocks), -1, rows) * blocks[:, None]
    original = tiny_checkpoint.tensors.rows(name, 0, rows).float()
    expected = quantize_weight(original, torch.from_numpy(blocks.T.copy()), how.weights).float()
    np.testing.assert_array_equal(data.astype(np.float32), expected.T.numpy())
    relative = np.abs(back.reshape(columns, rows) - original.T.numpy()).max() / original.abs().max()
    assert relative < {"int8": 0.005, "int4": 0.08, "w8a8": 0.005, "fp8": 0.04}[how.scheme]
    assert tensors["lm_head.weight_t"].dtype == (np.float16 if dtype == "fp16" else np.float32)


def unpacked(name: str) -> list[str]:
    """`a.q+k.weight` is packed from `a.q.weight` and `a.k.weight`."""
    *before, parts, last = name.split(".")
    return [".".join((*before, part, last)) for part in parts.split("+")]


def unsmoothed(how: QdqQuantization) -> QdqQuantization:
    return QdqQuantization(how.scheme, smoothing=0.0, keep=())


def test_projections_of_one_input_share_its_rounding(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Per layer four inputs are rounded: of query, key and value; of the output; of gate and up; of down."""
    export_bundle(tiny_checkpoint, tmp_path / "b", options(QdqQuantization("w8a8", keep=())))
    nodes = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False).graph.node
    kinds = [node.op_type for node in nodes]
    assert kinds.count("QuantizeLinear") == 2 * 4
    assert kinds.count("DequantizeLinear") == 2 * (4 + 4)  # query, key and value are packed, and gate and up


@pytest.mark.parametrize("scheme", ["int8", "int4", "w8a8", "fp8"])
def test_the_graph_computes_what_its_twin_computes(scheme: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The bundle in ONNX Runtime against PyTorch with the same weights and the same rounding of inputs."""
    export_bundle(tiny_checkpoint, tmp_path / "b", options(QdqQuantization(scheme, keep=())))
    tensors, how = stored(tmp_path / "b"), QdqQuantization(scheme)
    model = load_reference(tiny_checkpoint.config, tiny_checkpoint.tensors)
    modules, replaced = dict(model.named_modules()), 0
    for name, parameter in model.named_parameters():
        if name in tensors and parameter.ndim == 1:  # norms, into which smoothing was folded
            parameter.data = torch.from_numpy(tensors[name].copy())
    suffix = f"_{how.weights.stored.name.lower()}"
    for name in [n.removesuffix(suffix) for n in tensors if n.endswith(f".weight{suffix}")]:
        data = tensors[name + suffix]
        scales = tensors[f"{name}_scales"].reshape(-1, data.shape[1])
        back = data.astype(np.float32).reshape(len(scales), -1, data.shape[1]) * scales[:, None]
        packed = [modules[part.removesuffix(".weight")] for part in unpacked(name)]
        rows = torch.from_numpy(back.reshape(data.shape).T.copy()).split([m.out_features for m in packed])
        for module, weight in zip(packed, rows, strict=True):
            module.weight.data = weight
            replaced += 1
            if how.activations is not None:
                scale, grid = torch.tensor(tensors[f"{name}_input_scale"]), how.activations
                factor = torch.tensor(tensors.get(f"{name}_smoothing", 1.0))
                module.register_forward_pre_hook(
                    lambda _, x, f=factor, s=scale, g=grid: (round_to_grid(x[0] * f, s, g),)
                )
    assert replaced == 2 * 7
    ids = torch.randint(3, 32000, (2, 48), generator=torch.Generator().manual_seed(1)).tolist()
    expected = np.concatenate([reference_logits(model, row)[compared_positions(48)].numpy() for row in ids])
    difference = np.abs(bundle_logits(Bundle.open(tmp_path / "b"), ids)[0] - expected)
    exact = load_reference(tiny_checkpoint.config, tiny_checkpoint.tensors)
    plain = np.concatenate([reference_logits(exact, row)[compared_positions(48)].numpy() for row in ids])
    if how.activations is None:
        assert difference.max() < 1e-3
        assert np.abs(plain - expected).max() > 0.05
    else:  # inputs on the edge of a step fall to either side, and what follows with them: less than quantizing costs
        assert np.median(difference) < 0.3 * np.median(np.abs(plain - expected))


@pytest.mark.parametrize("scheme", ["w8a8", "fp8"])
def test_one_projection_is_exact(scheme: str) -> None:
    """A rounded input times a rounded weight, with bias and multiplier, as ONNX Runtime and as PyTorch compute it."""
    how, generator = QdqQuantization(scheme), torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((5, 32), (24, 32), (24,)))
    multiplier = torch.rand(32, generator=generator) + 0.5
    assert how.activations is not None
    scale = float((x * multiplier).abs().max() / how.activations.top * 0.9)  # the greatest values are cut off
    got = run_projection(QdqPlan(how, inputs={"w": InputPlan(scale, multiplier)}), x, weight, bias)
    scales = weight_scales(weight, how.weights, None, torch.float32)
    rounded = round_to_grid(x * multiplier, torch.tensor(scale), how.activations)
    expected = rounded @ (quantize_weight(weight, scales, how.weights).float() * scales).T + bias
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - (x * multiplier @ weight.T + bias)).abs().max() > 1e-2


def run_projection(plan: QdqPlan, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """One starling::Linear written by `plan`, its weights streamed to a file, run by ONNX Runtime."""

    class Source:
        tensors: ClassVar = {"w": weight, "b": bias}

        def names(self) -> list[str]:
            return list(self.tensors)

        def shape(self, name: str) -> tuple[int, ...]:
            return tuple(self.tensors[name].shape)

        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            return self.tensors[name][start:stop]

    floats = ir.TensorType(ir.DataType.FLOAT)
    given = ir.Value(name="x", type=floats, shape=ir.Shape(x.shape))
    graph = ir.Graph([given], [], nodes=[], opset_imports={"": 24, "starling": 1}, name="one")
    w = new_weight(graph, "w", ir.DataType.FLOAT, tuple(weight.shape), Rows(("w",)))
    b = new_weight(graph, "b", ir.DataType.FLOAT, tuple(bias.shape), Rows(("b",)))
    node = ir.node("Linear", [given, w, b], domain="starling", version=1)
    node.outputs[0].name, node.outputs[0].type = "y", floats
    node.outputs[0].shape = ir.Shape((len(x), len(weight)))
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    model = ir.Model(graph, ir_version=11)
    write_projections(model, plan)
    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    with tempfile.TemporaryDirectory() as folder:
        write_weights(model, WeightSource(Source(), None), Path(folder) / "weights")
        ir.save(model, Path(folder) / "one.onnx")
        session = onnxruntime.InferenceSession(Path(folder) / "one.onnx", settings)
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def test_a_block_that_divides_no_width_becomes_a_smaller_one(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    family = Family("narrow", "llama", {"hidden_size": 80, "intermediate_size": 192})
    folder = random_folder(family, tiny_checkpoint, tmp_path / "model")
    manifest = export_bundle(open_checkpoint(str(folder)), tmp_path / "b", options(QdqQuantization("int4"), check=True))
    assert manifest["notes"][:2] == [
        "blocks of 16 where weights are 80 wide: 128 does not divide it",
        "blocks of 64 where weights are 192 wide: 128 does not divide it",
    ]
    assert manifest["parity"]["mean_kl"] < 0.5


def test_a_width_without_any_block_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = random_folder(Family("odd", "llama", {"intermediate_size": 90}), tiny_checkpoint, tmp_path / "model")
    with pytest.raises(UserError, match=r"90 wide.*--quant int8"):
        export_bundle(open_checkpoint(str(folder)), tmp_path / "b", options(QdqQuantization("int4")))
    assert not (tmp_path / "b").exists()


def test_biases_and_a_tied_quantized_head(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    family = Family("biased", "qwen2", {"tie_word_embeddings": True})
    folder = random_folder(family, tiny_checkpoint, tmp_path / "model")
    how = QdqQuantization("w8a8", head=True, keep=())
    manifest = export_bundle(open_checkpoint(str(folder)), tmp_path / "b", options(how, check=True))
    tensors = stored(tmp_path / "b")
    heads = [name for name in tensors if name.endswith(".weight_int8") and "layers" not in name]
    assert len(heads) == 1
    assert tensors[heads[0]].shape == (64, 32002)
    assert manifest["parity"]["mean_kl"] < 0.1  # noise of this size; a lost bias or a smoothed embedding gives nats


def test_patterns_keep_projections(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What is packed with a projection is kept with it."""
    how = QdqQuantization("w8a8", keep=("*.down_proj.weight", "*.layers.0.self_attn.k_proj.weight"))
    manifest = export_bundle(tiny_checkpoint, tmp_path / "b", options(how, check=True))
    assert manifest["quantization"]["kept"] == [
        *(f"model.layers.0.self_attn.{side}_proj.weight" for side in "qkv"),
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    ]
    tensors = stored(tmp_path / "b")
    assert sum(name.endswith(".weight_int8") for name in tensors) == 2 * 4 - 3
    assert manifest["parity"]["mean_kl"] < 0.05
    with pytest.raises(UserError, match=r"'\*\.fc1'.*they are called such as"):
        export_bundle(tiny_checkpoint, tmp_path / "c", options(QdqQuantization("w8a8", keep=("*.fc1",))))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scheme": "int2"}, "int2"),
        ({"scheme": "int8", "block_size": 48}, "48"),
        ({"scheme": "w8a8", "block_size": 64}, "one scale per output channel"),
        ({"scheme": "int8", "smoothing": 0.5}, "int8 has none"),
        ({"scheme": "w8a8", "smoothing": 1.5}, "1.5"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        QdqQuantization(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("smoothing", [0, 1])
def test_whole_numbers_of_smoothing_are_floats_in_the_bundle(smoothing: int) -> None:
    assert type(QdqQuantization("w8a8", smoothing=smoothing).to_json()["smoothing"]) is float


def test_activations_are_quantized_in_the_tensorrt_dialect_only() -> None:
    with pytest.raises(UserError, match="w8a8 is for --dialect tensorrt"):
        ExportOptions(dialect="ort", quantization=QdqQuantization("w8a8"))


def test_int8_of_the_real_model_is_close(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    manifest = export_bundle(demo_checkpoint, tmp_path / "b", options(QdqQuantization("int8"), "fp16", check=True))
    assert manifest["parity"]["mean_kl"] <= 0.005
    assert json.loads((tmp_path / "b" / "bundle.json").read_text())["parity"] == manifest["parity"]
