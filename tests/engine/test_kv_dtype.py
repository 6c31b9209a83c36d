"""A KV cache of another type than the bundle was exported with."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from command_line import refusal
from families import Family, random_folder
from transformers import AutoModelForCausalLM, DynamicCache

from starling.engine.backends.onnxruntime.cache_graph import graph_with_cache
from starling.engine.backends.open_backend import open_backend
from starling.engine.bundle.manifest import Bundle
from starling.engine.engine import Engine
from starling.engine.errors import BackendError, UserError
from starling.engine.kernels import SWITCH, kernel_library
from starling.engine.names import PAST, PRESENT, DType
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
PROMPT, STEPS = 24, 6


pytestmark = pytest.mark.skipif(kernel_library() is None, reason="the CPU kernels do not run here")


class _RoundedCache(DynamicCache):
    """PyTorch's cache, with keys and values rounded to a type."""

    def __init__(self, kind: torch.dtype | None) -> None:
        super().__init__()
        self._kind = kind

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *arguments: object, **options: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._kind is not None:
            key_states, value_states = key_states.to(self._kind).float(), value_states.to(self._kind).float()
        return super().update(key_states, value_states, *arguments, **options)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_folder(Family("plain", "mistral", {}), tiny_checkpoint, tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundle") / "fp32"
    export_bundle(open_checkpoint(str(model)), folder, ExportOptions(check=False))
    return Bundle.open(folder)


def _pytorch_logits(model: Path, ids: np.ndarray, kind: torch.dtype | None) -> np.ndarray:
    """Logits [STEPS, vocab] of single tokens after a prompt of PROMPT, all through the cache."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()
    cache, found = _RoundedCache(kind), []
    with torch.inference_mode():
        reference(torch.from_numpy(ids[None, :PROMPT]), past_key_values=cache)
        for at in range(PROMPT, PROMPT + STEPS):
            step = reference(torch.from_numpy(ids[None, at : at + 1]), past_key_values=cache)
            found.append(step.logits[0, -1].numpy())
    return np.stack(found)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_logits_are_those_of_pytorch_with_keys_and_values_rounded(dtype: DType, model: Path, bundle: Bundle) -> None:
    ids = np.random.default_rng(1).integers(3, 32000, PROMPT + STEPS)
    rounded, exact = (_pytorch_logits(model, ids, kind) for kind in (TORCH[dtype], None))
    backend = open_backend(bundle.with_kv_dtype(dtype), name="onnxruntime-cpu", max_seq=64, threads=1)
    backend.prefill(0, ids[:PROMPT], 0)
    found = np.stack([backend.decode([int(ids[at])], [at]).logits()[0].copy() for at in range(PROMPT, PROMPT + STEPS)])
    backend.close()
    away, off = np.abs(found - rounded).max(), np.abs(exact - rounded).max()
    assert away < off / 4, (away, off)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_the_cache_takes_the_bytes_of_its_type(dtype: DType, size: int, bundle: Bundle) -> None:
    arch = bundle.architecture
    with Engine(bundle, kv_dtype=dtype, max_seq=48, max_batch=2) as engine:
        numbers = 2 * arch.layers * arch.kv_heads * arch.head_dim * 48 * 2
        assert engine.kv_cache_bytes == numbers * size
        assert engine.bundle.kv_cache.bytes_per_token == numbers * size // (48 * 2)
        assert len(engine.generate("a b c", max_tokens=4, ignore_eos=True).tokens) == 4


def test_a_bundle_of_16_bits_may_keep_its_cache_in_32(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "b", ExportOptions(dtype="fp16", check=False))
    with Engine(tmp_path / "b", max_seq=48) as plain, Engine(tmp_path / "b", kv_dtype="fp32", max_seq=48) as wide:
        assert wide.kv_cache_bytes == 2 * plain.kv_cache_bytes
        assert len(wide.generate("a b c", max_tokens=4, ignore_eos=True).tokens) == 4


def test_only_the_cache_of_the_graph_has_another_type(bundle: Bundle) -> None:
    file = bundle.folder / str(bundle.kernel_graph)
    before, after = onnx.load(file, load_external_data=False), onnx.ModelProto()
    after.ParseFromString(graph_with_cache(file, onnx.TensorProto.FLOAT16))
    cached = 0
    for value in (*before.graph.input, *before.graph.output):
        if value.name.startswith((PAST, PRESENT)):
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
            cached += 1
    assert cached == 4 * bundle.architecture.layers
    assert after == before


def test_what_cannot_have_another_type_is_refused(bundle: Bundle, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"kv_dtype 'fp61' is unknown.*fp16"):
        bundle.with_kv_dtype("fp61")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="not that of the CPU kernels"):  # ONNX Runtime's own attention
        graph_with_cache(bundle.graph_path, onnx.TensorProto.FLOAT16)
    torn = tmp_path / "torn.onnx"
    torn.write_bytes((bundle.folder / str(bundle.kernel_graph)).read_bytes()[:-7])
    with pytest.raises(BackendError, match="is not an ONNX file"):
        graph_with_cache(torn, onnx.TensorProto.FLOAT16)
    export_bundle(tiny_checkpoint, tmp_path / "canonical", ExportOptions(dialect="canonical", check=False))
    line = refusal("generate", tmp_path / "canonical", "a", "--kv-dtype", "fp16")
    assert "its KV cache stays float32: only the CPU kernels read another type" in line


def test_where_the_kernels_do_not_run_the_line_says_so(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    with pytest.raises(BackendError, match=r"its KV cache stays float32 without CPU kernels: .*: leave kv_dtype out"):
        open_backend(bundle.with_kv_dtype("fp16"), name="onnxruntime-cpu", max_seq=64)
