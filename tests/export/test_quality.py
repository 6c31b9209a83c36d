"""The figures that a bundle carries, and the bound that quantized activations are held to."""

import json
from pathlib import Path

import pytest
import torch
from command_line import document, refusal, starling
from families import Family, random_folder, with_a_spike
from safetensors.torch import save_file

from starling.engine.errors import UserError
from starling.export.check.bundle_quality import require_quality
from starling.export.check.parity import Parity
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.calibration_choice import Calibration
from starling.export.quantization.precision_choice import choose_kept, rank_groups
from starling.export.quantization.qdq_scheme import MAX_MEAN_KL
from starling.export.quantization.qdq_settings import QdqQuantization

pytestmark = pytest.mark.slow

TENSORRT = ("--dialect", "tensorrt", "--quant")


@pytest.fixture
def spiky(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A model with a channel that no scale of a whole tensor can serve."""
    folder = random_folder(Family("llama", "llama"), tiny_checkpoint, tmp_path / "model")
    checkpoint = open_checkpoint(str(folder))
    spiked = with_a_spike(checkpoint, layer=1)
    weights = {name: spiked.rows(name, 0, spiked.shape(name)[0]) for name in checkpoint.tensors.names()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return open_checkpoint(str(folder))


def w8a8(smoothing: float, keep: tuple[str, ...] | None, *, accept: bool = False) -> ExportOptions:
    how = QdqQuantization("w8a8", smoothing=smoothing, keep=keep)
    text = Calibration(tokens=512)
    return ExportOptions(dialect="tensorrt", quantization=how, calibration=text, check=True, accept_quality=accept)


def test_a_bundle_beyond_the_bound_is_not_written(spiky: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"mean KL \d\.\d+ nats .* more than 0\.05; try another --smoothing"):
        export_bundle(spiky, tmp_path / "b", w8a8(0.0, ()))
    assert not (tmp_path / "b").exists()
    manifest = export_bundle(spiky, tmp_path / "b", w8a8(0.0, (), accept=True))
    assert manifest["parity"]["mean_kl"] > MAX_MEAN_KL


def test_the_costliest_projections_are_left_out_until_the_bound_is_met(spiky: Checkpoint, tmp_path: Path) -> None:
    manifest = export_bundle(spiky, tmp_path / "b", w8a8(0.0, None))
    assert manifest["parity"]["mean_kl"] <= MAX_MEAN_KL
    kept = manifest["quantization"]["kept"]
    assert "model.layers.1.mlp.gate_proj.weight" in kept
    assert len(kept) < 3 * 7


def test_weight_only_bundles_carry_figures_and_no_bound(tiny_checkpoint: Checkpoint) -> None:
    bad = Parity(392, 2, 9.0, 1.0, 5.0, 0.4, 20.0, 10.0)
    require_quality(bad, None)
    require_quality(bad, QdqQuantization("int4"))
    for scheme in ("w8a8", "fp8"):
        with pytest.raises(UserError, match=f"{scheme}: mean KL 1.000"):
            require_quality(bad, QdqQuantization(scheme))


def test_the_choice_keeps_as_few_as_needed() -> None:
    """A model whose KL is the sum of its groups' costs, so that the right answer is known."""
    from starling.export.check.sample_texts import TokenRows
    from starling.export.quantization.smoothquant import InputGroup

    costs = [0.001, 0.2, 0.004, 0.03, 0.002]
    groups = [InputGroup(((f"w{i}",),), (), False) for i in range(len(costs))]

    class Additive:
        """Two outcomes whose KL to an even coin is what the active groups cost."""

        def activate(self, weights: set[str]) -> None:
            self.cost = sum(cost for i, cost in enumerate(costs) if f"w{i}" in weights)

        def log_probabilities(self, rows: TokenRows) -> torch.Tensor:
            # KL((1/2, 1/2) || (p, 1 - p)) = -ln(4 p (1 - p)) / 2
            p = (1 + (1 - torch.exp(torch.tensor(-2 * self.cost))).sqrt()) / 2
            return torch.stack([p, 1 - p]).log()[None]

    rows = TokenRows(torch.zeros(1, 1, dtype=torch.int64), (1,))
    simulation = Additive()
    ranked = rank_groups(simulation, groups, rows)  # type: ignore[arg-type]
    assert [group.tensors[0] for group in ranked] == ["w1", "w3", "w2", "w4", "w0"]
    for target, kept in ((0.3, 0), (0.05, 1), (0.0075, 2), (0.0035, 3), (0.0005, 5)):
        assert len(choose_kept(simulation, groups, rows, target)) == kept  # type: ignore[arg-type]


def test_the_command_line_shows_what_was_done(tmp_path: Path) -> None:
    out = tmp_path / "b"
    finished = starling(
        *("export", "random:starling-tiny", out, *TENSORRT, "w8a8", "--dtype", "fp16", "--check"),
        *("--calibration-tokens", "512", "--keep-precision", "*.layers.0.mlp.down_proj.weight"),
    )
    assert finished.returncode == 0, finished.stderr
    assert "calibrating on 512 tokens" in finished.stderr
    first, parity, *_ = finished.stdout.splitlines()
    assert (
        "w8a8 weights and activations (weights per output channel, smoothing 0.8, 1 projections kept in fp16)" in first
    )
    assert "KL mean" in parity
    assert "over 392 positions" in parity
    shown = document("inspect", out)["quantization"]
    assert shown == json.loads((out / "bundle.json").read_text())["quantization"]
    assert shown["kept"] == ["model.layers.0.mlp.down_proj.weight"]
    assert "kept" in starling("inspect", out).stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--quant", "w8a8"), "--quant w8a8 is for --dialect tensorrt; dialect ort quantizes weights only"),
        ((*TENSORRT, "int8", "--symmetric"), "--symmetric is for --dialect ort"),
        ((*TENSORRT, "int8", "--smoothing", "0.5"), "--smoothing is about quantized activations"),
        (
            (*TENSORRT, "int4", "--calibration", "x.txt"),
            "--calibration is for --quant int4 of dialect ort",
        ),
        ((*TENSORRT, "w8a8", "--smoothing", "2"), "smoothing 2 is not between 0 (none) and 1"),
        ((*TENSORRT, "w8a8", "--block-size", "64"), "w8a8 has one scale per output channel"),
        (("--quant", "int8", "--quantize-head"), "--quantize-head is for --dialect tensorrt"),
        (("--dialect", "tensorrt", "--keep-precision", "x"), "--keep-precision is about quantized weights"),
        (("--dialect", "canonical", "--quant", "int8"), "dialect canonical is full precision only"),
    ],
)
def test_impossible_settings(options: tuple[str, ...], expected: str, tmp_path: Path) -> None:
    assert expected in refusal("export", "random:starling-tiny", tmp_path / "out", *options)
