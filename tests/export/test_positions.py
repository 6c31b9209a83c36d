"""A bundle's rotary tables cover what it can be asked for, not whatever its model promises."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command_line import document, refusal
from onnx import numpy_helper
from plain_checkpoints import write_folder
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from starling.engine.engine import Engine
from starling.engine.errors import PromptError, UserError
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.tracing.architecture import MOST_POSITIONS

MILLION = 2**20
SHAPE = {"head_dim": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 1 MB that promises a million positions."""
    return write_folder(tmp_path_factory.mktemp("long"), max_position_embeddings=MILLION, **SHAPE)


def size(bundle: Path) -> int:
    return sum(file.stat().st_size for file in bundle.rglob("*"))


@pytest.fixture(scope="module")
def exported(long_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Its bundle, and the MiB that the export took."""
    out = tmp_path_factory.mktemp("exported") / "out"
    program = (
        "import sys; from starling.cli.main import main; code = main(sys.argv[1:])\n"
        "from starling.profiling.machine.describe import peak_rss_bytes\n"
        "print(peak_rss_bytes() // 2**20); sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "export", str(long_folder), str(out), "--no-check"]
    return out, int(subprocess.check_output(command, text=True).splitlines()[-1])


def test_a_promise_of_a_million_positions_costs_no_more_than_128k(exported: tuple[Path, int]) -> None:
    out, rss_mib = exported
    assert size(out) < 70 * 2**20
    assert rss_mib < 1400
    shown = document("inspect", out)
    assert shown["architecture"]["max_positions"] == MOST_POSITIONS
    assert any("131,072 tokens, of the model's 1,048,576 (--max-positions)" in note for note in shown["notes"])


def test_the_tables_are_the_models_own(long_folder: Path, exported: tuple[Path, int]) -> None:
    model = onnx.load(str(exported[0] / "model.onnx"))
    tables = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name.startswith("rotary_")}
    rotary = LlamaRotaryEmbedding(LlamaConfig.from_pretrained(long_folder))
    expected = rotary(torch.zeros(1, 1, 1), torch.arange(MOST_POSITIONS)[None])
    for name, values in zip(("cos", "sin"), expected, strict=True):
        np.testing.assert_array_equal(tables[f"rotary_0_{name}"], values[0, :, :64].numpy())


def test_as_many_as_are_wanted(long_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(long_folder))
    export_bundle(checkpoint, tmp_path / "out", ExportOptions(check=True, max_positions=100))
    assert size(tmp_path / "out") < 3 * 2**20
    with Engine(tmp_path / "out", max_seq=100) as engine:
        assert (
            len(engine.generate("a" * 90, max_tokens=100, ignore_eos=True).tokens) == 11
        )  # the last needs no position
    with pytest.raises(PromptError, match="max_seq is 101, but this model has 100 positions"):
        Engine(tmp_path / "out", max_seq=101)


def test_more_than_the_model_has_is_refused(long_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_positions is 1048577, but this model has 1048576 positions") as caught:
        export_bundle(open_checkpoint(str(long_folder)), tmp_path / "out", ExportOptions(max_positions=MILLION + 1))
    assert caught.value.field == "max_positions"
    assert not (tmp_path / "out").exists()
    assert "give 64 to 1048576" in refusal("export", long_folder, tmp_path / "out", "--max-positions", str(MILLION + 1))
