"""The export's check finds faults of the exporter's own reader: each is put in on purpose, and no bundle comes out.

The faults are made by patching the reader; the check stays as it is.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import SMALL, Family, random_folder
from gguf_models import VOCABULARY, write_gguf
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, LlamaConfig, PreTrainedConfig

from starling.engine.errors import StarlingError
from starling.export.check.bundle_quality import load_compared
from starling.export.checkpoints import gguf_checkpoint, huggingface, placement, stored_tensors
from starling.export.checkpoints.checkpoint import Checkpoint, TensorSource
from starling.export.checkpoints.gguf_checkpoint import GgufTensors
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.checkpoints.placement import PlacedTensors
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization
from starling.export.weights import weight_source

pytestmark = pytest.mark.slow

GGUF_SHAPE = SMALL | {"vocab_size": VOCABULARY, "num_key_value_heads": 4, "head_dim": 16}
GEMMA = GGUF_SHAPE | {"sliding_window": 9, "tie_word_embeddings": True}
GGUF_CONFIGS = {"llama": LlamaConfig(**GGUF_SHAPE), "gemma2": Gemma2Config(**GEMMA)}
Patch = pytest.MonkeyPatch
Rows = Callable[[Any, str, int, int], torch.Tensor]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Checkpoint) -> Path:
    """A checkpoint in several files, one tensor of which is in two: the later is right."""
    family = Family("faults", "llama", {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True})
    folder = random_folder(family, tiny_checkpoint, tmp_path_factory.mktemp("checkpoint"), max_shard_size="100KB")
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    name = "model.layers.1.mlp.down_proj.weight"
    weights = {path: load_file(path) for path in (first, last)}
    save_file(weights[first] | {name: torch.randn(64, 96)}, first)
    save_file(weights[last] | {name: torch.randn(64, 96) * 0.15}, last)
    return folder


def export(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    return export_bundle(open_checkpoint(str(folder)), out, ExportOptions(check=True, **options))


def reads(patch: Patch, change: Callable[[Rows, TensorSource, str, int, int], torch.Tensor]) -> None:
    """Every row that the exporter reads goes through `change`."""
    for reader in (PlacedTensors, GgufTensors):
        patch.setattr(reader, "rows", _through(reader.rows, change))


def _through(original: Rows, change: Callable[[Rows, TensorSource, str, int, int], torch.Tensor]) -> Rows:
    return lambda self, *where: change(original, self, *where)


def renamed(wrong: dict[str, str]) -> Callable[[Patch], None]:
    """The reader takes one tensor for another."""

    def name_of(name: str) -> str:
        for right, taken in wrong.items():
            if right in name:
                return name.replace(right, taken)
        return name

    return lambda patch: reads(patch, lambda rows, self, name, *where: rows(self, name_of(name), *where))


def altered(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Patch], None]:
    """The reader changes the values of the tensors whose name has `part`."""

    def rows_of(rows: Rows, self: TensorSource, name: str, start: int, stop: int) -> torch.Tensor:
        found = rows(self, name, start, stop)
        return change(found) if part in name else found

    return lambda patch: reads(patch, rows_of)


def transposed(patch: Patch) -> None:
    def rows_of(rows: Rows, self: TensorSource, name: str, start: int, stop: int) -> torch.Tensor:
        if "q_proj.weight" not in name:
            return rows(self, name, start, stop)
        return rows(self, name, 0, self.shape(name)[0]).T[start:stop].contiguous()

    reads(patch, rows_of)


def rows_one_off(patch: Patch) -> None:
    original = stored_tensors.SafetensorsFiles.rows

    def rows(self: Any, name: str, start: int, stop: int) -> torch.Tensor:
        if "o_proj.weight" not in name:
            return original(self, name, start, stop)
        return original(self, name, start, stop).roll(1, 0)

    patch.setattr(stored_tensors.SafetensorsFiles, "rows", rows)


def configured(change: Callable[[PreTrainedConfig], None]) -> Callable[[Patch], None]:
    """The reader reads another configuration than config.json has."""

    def changed(original: Callable[[Any], PreTrainedConfig]) -> Callable[[Any], PreTrainedConfig]:
        def read(source: Any) -> PreTrainedConfig:
            config = original(source)
            change(config)
            return config

        return read

    def install(patch: Patch) -> None:
        patch.setattr(huggingface, "read_config", changed(huggingface.read_config))
        patch.setattr(gguf_checkpoint, "gguf_config", changed(gguf_checkpoint.gguf_config))

    return install


def dropped_bias(patch: Patch) -> None:
    configured(lambda config: setattr(config, "attention_bias", False))(patch)
    patch.setattr(placement, "judge", lambda *_: [])


def dropped_adapter(patch: Patch) -> None:
    """The reader leaves out a tensor of the file without a word; as if the file had one."""
    original = stored_tensors._entries_of
    patch.setattr(placement, "judge", lambda *_: [])
    patch.setattr(
        stored_tensors, "_entries_of", lambda path: {n: e for n, e in original(path).items() if "lora" not in n}
    )


def earlier_file_wins(patch: Patch) -> None:
    patch.setattr(stored_tensors, "sorted", lambda names: sorted(names, reverse=True), raising=False)


def one_value_changed(rows: torch.Tensor) -> torch.Tensor:
    rows[:1, :1] += 0.001
    return rows


FAULTS: dict[str, Callable[[Patch], None]] = {
    "key and value swapped": renamed({"k_proj": "v_proj", "v_proj": "k_proj"}),
    "gate and up swapped": renamed({"gate_proj": "up_proj", "up_proj": "gate_proj"}),
    "a bias dropped": dropped_bias,
    "a bias of zeros": altered("q_proj.bias", torch.zeros_like),
    "lm_head tied to the embedding": lambda patch: patch.setattr(placement, "_tied_head", lambda *_: "lm_head.weight"),
    "rotary base shifted": configured(lambda config: config.rope_parameters.update(rope_theta=10001.0)),
    "epsilon of the norms": configured(lambda config: setattr(config, "rms_norm_eps", 1e-5)),
    "a square matrix transposed": transposed,
    "one layer read twice": renamed({"layers.2.": "layers.1."}),
    "the norm of another place": renamed({"input_layernorm": "post_attention_layernorm"}),
    "rows off by one": rows_one_off,
    "the earlier of two files": earlier_file_wins,
    "weights scaled by 1.01": altered("down_proj.weight", lambda rows: rows * 1.01),
    "one value of a matrix": altered("layers.1.self_attn.o_proj.weight", one_value_changed),
    "rounded to bfloat16": altered("proj.weight", lambda rows: rows.bfloat16().float()),
    "the embedding's rows reversed": altered("embed_tokens", lambda rows: rows.flip(0)),
}


def test_without_a_fault_the_bundle_is_written(sharded: Path, tmp_path: Path) -> None:
    assert export(sharded, tmp_path / "bundle")["parity"]["max_abs_logit_diff"] < 1e-3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_reader_is_found(fault: str, sharded: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(StarlingError, match="please report it") as caught:
        export(sharded, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    print(f"{fault}: {caught.value}")


def _in_pairs(self: GgufTensors, stored: str) -> Any:
    return np.arange(self._file.tensors[stored].shape[0])


def without_minus_one(patch: Patch) -> None:
    found = replace(gguf_checkpoint.ARCHITECTURES["gemma2"], norm_plus_one=False)
    patch.setattr(gguf_checkpoint, "ARCHITECTURES", dict(gguf_checkpoint.ARCHITECTURES) | {"gemma2": found})


GGUF_FAULTS: dict[str, tuple[str, Callable[[Patch], None]]] = {
    "query and key left in pairs": ("llama", lambda patch: patch.setattr(GgufTensors, "_order", _in_pairs)),
    "norms left plus one": ("gemma2", without_minus_one),
    "window of another width": ("gemma2", configured(lambda config: setattr(config, "sliding_window", 8))),
} | {
    name: ("llama", FAULTS[name])
    for name in (
        "key and value swapped",
        "rotary base shifted",
        "epsilon of the norms",
        "one layer read twice",
        "weights scaled by 1.01",
    )
}


@pytest.mark.parametrize("fault", [None, *GGUF_FAULTS])
def test_a_fault_of_the_gguf_reader_is_found(fault: str | None, tmp_path: Path, monkeypatch: Patch) -> None:
    family, install = GGUF_FAULTS[fault] if fault is not None else ("llama", None)
    write_gguf(tmp_path / "m.gguf", GGUF_CONFIGS[family])
    if install is None:
        manifest = export(tmp_path / "m.gguf", tmp_path / "bundle")
        assert manifest["parity"]["max_abs_logit_diff"] < 1e-3
        return
    install(monkeypatch)
    with pytest.raises(StarlingError, match="please report it") as caught:
        load_compared(open_checkpoint(str(tmp_path / "m.gguf")))
    print(f"{fault}: {caught.value}")


@pytest.mark.parametrize(
    "options", [{"quantization": BlockQuantization("int8")}, {"dtype": "bf16"}], ids=["int8", "bf16"]
)
def test_rounding_hides_no_fault(options: dict[str, Any], sharded: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    FAULTS["weights scaled by 1.01"](monkeypatch)
    with pytest.raises(StarlingError, match=r"down_proj\.weight is not what transformers loads"):
        export(sharded, tmp_path / "bundle", **options)


def test_a_tensor_dropped_without_a_word_is_found(sharded: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for path in sharded.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    last = sorted(folder.glob("model-*.safetensors"))[-1]
    save_file(load_file(last) | {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)}, last)
    dropped_adapter(monkeypatch)
    with pytest.raises(StarlingError, match=r"lora_A\.weight as unexpected, the export said nothing"):
        export(folder, tmp_path / "bundle")


def test_the_first_layers_of_a_model_that_does_not_fit_are_held_to_the_same(
    sharded: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("starling.export.exporter.fits", lambda arch, layers: layers < 3)
    assert export(sharded, tmp_path / "right")["parity"]["layers"] == 2
    FAULTS["key and value swapped"](monkeypatch)
    with pytest.raises(StarlingError, match="is not what transformers loads"):
        export(sharded, tmp_path / "bundle")


def test_a_fault_after_the_reader_shows_in_the_logits(sharded: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    original = weight_source.narrowed

    def narrow(rows: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
        return original(rows * 1.01 if "down_proj" in name else rows, dtype, name)

    monkeypatch.setattr(weight_source, "narrowed", narrow)
    with pytest.raises(StarlingError, match="the exported graph disagrees with PyTorch"):
        export(sharded, tmp_path / "bundle")
