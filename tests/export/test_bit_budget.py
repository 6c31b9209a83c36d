"""`--bits`: which projections get 8 bits, by what rounding them changes, and that the bundle has them."""

import json
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from families import Family, random_folder
from torch import Tensor, nn
from torch.nn import functional

from starling.engine import Engine
from starling.engine.errors import UserError
from starling.export.check.sample_texts import TokenRows
from starling.export.check.torch_reference import load_reference
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.bit_budget import RoundingCosts, choose_eight_bits
from starling.export.quantization.blocks import BlockQuantization, dequantize, quantize_rows
from starling.export.quantization.calibration_choice import NONE, Calibration

INT4 = BlockQuantization("int4")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = random_folder(Family("llama", "llama"), tiny_checkpoint, tmp_path_factory.mktemp("model"))
    return open_checkpoint(str(folder))


class TestChoice:
    """The costliest a weight, as many as fit."""

    UNITS = {("q", "k", "v"): 300, ("o",): 100, ("down",): 400}  # noqa: RUF012

    def test_the_costliest_a_weight_come_first(self) -> None:
        costs = {"q": 1.0, "k": 1.0, "v": 1.0, "o": 0.5, "down": 5.0}
        assert choose_eight_bits(self.UNITS, costs, 6.0) == {"down"}
        assert choose_eight_bits(self.UNITS, costs, 6.5) == {"down", "o"}  # q, k and v have no room, o has
        assert choose_eight_bits(self.UNITS, costs, 8.0) == {"q", "k", "v", "o", "down"}

    def test_four_bits_leave_no_room(self) -> None:
        assert choose_eight_bits(self.UNITS, {"q": 1.0, "o": 1.0, "down": 1.0}, 4.0) == frozenset()


def test_costs_are_the_change_of_the_stream_by_rounding(model: Checkpoint) -> None:
    """Against PyTorch's whole model, a layer at a time, from the definition."""
    ids = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(4))
    rows = TokenRows(ids, (24, 24, 24, 11))
    names = [name for name in model.tensors.names() if name.endswith("_proj.weight")]
    found = RoundingCosts(names, INT4, rows).run(model.config, model.tensors)
    assert found.keys() == set(names)

    reference: nn.Module = load_reference(model.config, model.tensors)
    seen: dict[str, Tensor] = {}
    for name, module in reference.named_modules():
        hook = lambda _, given, kept, made, name=name: seen.update(  # noqa: E731
            {
                f"{name}:in": given[0] if given else kept["hidden_states"],
                f"{name}:out": made[0] if isinstance(made, tuple) else made,
            }
        )
        if name.endswith(("_proj", "self_attn", "mlp")) or name.split(".")[-2:-1] == ["layers"]:
            module.register_forward_hook(hook, with_kwargs=True)
    with torch.inference_mode():
        reference.base_model(input_ids=ids, use_cache=False)

    def power(x: Tensor) -> float:
        return sum(float(row[:length].square().sum()) for row, length in zip(x, rows.lengths, strict=True))

    for name in names:
        linear, part, layer = name.removesuffix(".weight"), *(name.rsplit(".", cut)[0] for cut in (2, 3))
        weight = reference.get_parameter(name).detach()
        rounded = dequantize(quantize_rows(weight, INT4), INT4, weight.shape[1])
        x = seen[f"{linear}:in"]
        relative = power(functional.linear(x, weight - rounded)) / power(functional.linear(x, weight))
        expected = relative * power(seen[f"{part}:out"]) / power(seen[f"{layer}:in"])
        assert found[name] == pytest.approx(expected, rel=1e-3)


def test_a_bundle_has_so_many_bits_on_average(model: Checkpoint, tmp_path: Path) -> None:
    how = BlockQuantization("int4", mean_bits=5.0)
    manifest = export_bundle(model, tmp_path / "five", ExportOptions(quantization=how, check=False))
    graph = ir.load(tmp_path / "five" / "model.onnx").graph
    sizes: dict[int, int] = {4: 0, 8: 0}
    for node in graph:
        if node.op_type == "MatMulNBits" and not node.outputs[0].is_graph_output():
            sizes[node.attributes["bits"].as_int()] += node.attributes["K"].as_int() * node.attributes["N"].as_int()
    assert 4.5 < (4 * sizes[4] + 8 * sizes[8]) / (sizes[4] + sizes[8]) <= 5.0
    chosen = [name for name in manifest["quantization"]["eight_bits"] if name.endswith("_proj.weight")]
    assert sum(model.tensors.shape(name)[0] * model.tensors.shape(name)[1] for name in chosen) == sizes[8]
    assert json.loads((tmp_path / "five" / "bundle.json").read_text())["quantization"]["scheme"] == "int4"
    with Engine(tmp_path / "five", backend="onnxruntime-cpu", max_seq=64, threads=1) as engine:
        assert len(engine.generate([5, 6, 7], max_tokens=4, ignore_eos=True).tokens) == 4


def test_a_choice_wants_a_text(model: Checkpoint, tmp_path: Path) -> None:
    how = BlockQuantization("int4", mean_bits=5.0)
    options = ExportOptions(quantization=how, calibration=Calibration(NONE), check=False)
    with pytest.raises(UserError, match="leave out --calibration none"):
        export_bundle(model, tmp_path / "five", options)
    assert not (tmp_path / "five").exists()


@pytest.mark.parametrize(("scheme", "bits"), [("int4", 3.9), ("int4", 8.5), ("int4", float("nan")), ("int8", 5.0)])
def test_impossible_averages_are_refused(scheme: str, bits: float) -> None:
    with pytest.raises(UserError, match="bits a weight: give 4 to 8, for int4"):
        BlockQuantization(scheme, mean_bits=bits)
