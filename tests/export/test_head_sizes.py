"""Widths of heads that ONNX Runtime's attention takes in part, or not at all."""

from pathlib import Path
from typing import Any

import pytest
from families import Family, random_folder

from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization

pytestmark = pytest.mark.slow


def export_of(width: int, tokenizer: Checkpoint, folder: Path, **options: Any) -> dict[str, Any]:
    random_folder(Family("heads", "llama", {"head_dim": width}), tokenizer, folder / "model")
    checkpoint = open_checkpoint(str(folder / "model"))
    return export_bundle(checkpoint, folder / "bundle", ExportOptions(check=True, **options))


@pytest.mark.parametrize("width", [8, 24, 120])
def test_heads_that_attention_cannot_rotate_are_rotated_before_it(
    width: int, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    manifest = export_of(width, tiny_checkpoint, tmp_path)
    assert manifest["architecture"]["head_dim"] == width
    assert manifest["parity"]["max_abs_logit_diff"] < 1e-3


def test_the_cpu_kernels_take_them_too(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for kernels in ("1", "0"):
        monkeypatch.setenv("STARLING_CPU_KERNELS", kernels)
        (tmp_path / kernels).mkdir()
        how = BlockQuantization("int8")
        found.append(export_of(24, tiny_checkpoint, tmp_path / kernels, quantization=how)["parity"]["mean_kl"])
    assert found[0] == pytest.approx(found[1], rel=0.2)


@pytest.mark.parametrize(("width", "padded"), [(12, 16), (20, 24)])
def test_other_widths_are_padded(width: int, padded: int, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    manifest = export_of(width, tiny_checkpoint, tmp_path)
    assert manifest["architecture"]["head_dim"] == padded
    assert manifest["parity"]["max_abs_logit_diff"] < 1e-3
