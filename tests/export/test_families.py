"""Every family is proved against PyTorch: prefill, a chunk after it, decode, and beyond the sliding window."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families import Family, random_folder
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from starling.engine.backends.open_backend import open_backend
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UnsupportedModelError
from starling.engine.kernels import kernel_library
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization

pytestmark = pytest.mark.slow

TOKENS = 40  # well beyond every window below
WINDOW = 9
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
TWO_ROTARY_BASES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}

FAMILIES = [
    Family("llama", "llama"),
    Family("llama-tied", "llama", {"tie_word_embeddings": True}),
    Family("llama-bias", "llama", {"attention_bias": True, "mlp_bias": True}),
    Family("llama3-rope", "llama", {"rope_parameters": LLAMA3_ROPE}),
    Family("llama-yarn", "llama", {"rope_parameters": YARN_ROPE}),
    Family("mistral-window", "mistral", {"sliding_window": WINDOW}),
    Family("mistral-full", "mistral", {"sliding_window": None}),
    Family("qwen2-bias", "qwen2"),
    Family(
        "qwen2-mixed-windows", "qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    Family("qwen3-qk-norm", "qwen3"),
    Family("phi3-fused", "phi3", {"sliding_window": None}),
    Family("phi3-partial-rotary-window", "phi3", {"sliding_window": WINDOW, "rope_parameters": PARTIAL_ROPE}),
    Family("smollm3-layers-without-rotary", "smollm3", {"no_rope_layers": [1, 0, 1]}),
    Family(
        "granite-multipliers",
        "granite",
        {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2},
    ),
    Family("olmo2-post-norm", "olmo2"),
    Family("cohere-interleaved-rotary", "cohere"),
    Family("gemma-norms-of-one-plus-weight", "gemma"),
    Family(
        "gemma3-two-rotary-bases-one-kv-head",
        "gemma3_text",
        {
            "num_key_value_heads": 1,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": TWO_ROTARY_BASES,
            "tie_word_embeddings": True,
        },
    ),
    Family(
        "olmo3-mixed-windows",
        "olmo3",
        {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    Family("phi-partial-rotary-split-before", "phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    Family("stablelm-partial-rotary", "stablelm", {"head_dim": 16, "partial_rotary_factor": 0.25}),
    Family("hunyuan-norm-after-rotary", "hunyuan_v1_dense"),
]


@pytest.mark.parametrize("dialect", ["ort", "canonical", "tensorrt"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_logits_are_pytorchs(
    family: Family, dialect: str, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_folder(family, tiny_checkpoint, tmp_path / "model")
    export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(dialect=dialect, check=False))
    ids = torch.randint(3, 32000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = reference(ids).logits[0].numpy()

    for kernels in ("1", "0") if dialect == "ort" else ("1",):
        monkeypatch.setenv("STARLING_CPU_KERNELS", kernels)
        whole, steps = steps_of(tmp_path / "bundle", ids[0].numpy())
        assert np.abs(whole - expected[-1]).max() < 1e-3
        for at, logits in steps.items():
            assert np.abs(logits - expected[at]).max() < 1e-3, f"position {at}, kernels {kernels}"
    assert expected.std() > 0.05  # the comparison is of something


@pytest.mark.skipif(kernel_library() is None, reason="the CPU kernels are not built on this machine")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_int8_on_the_kernels_is_as_near_to_pytorch_as_on_onnx_runtimes_operators(
    family: Family, tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_folder(family, tiny_checkpoint, tmp_path / "model")
    options = ExportOptions(quantization=BlockQuantization("int8"), check=False)
    export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", options)
    ids = torch.randint(3, 32000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = reference(ids).logits[0].numpy()
    errors = []
    for kernels in ("1", "0"):
        monkeypatch.setenv("STARLING_CPU_KERNELS", kernels)
        whole, steps = steps_of(tmp_path / "bundle", ids[0].numpy())
        if kernels == "1":  # how the tokens are cut changes no bit
            np.testing.assert_array_equal(whole, steps[TOKENS - 1])
        errors.append(np.sqrt(np.mean([np.square(logits - expected[at]).mean() for at, logits in steps.items()])))
    assert errors[0] < 1.2 * errors[1]
    assert errors[0] < 0.2 * expected.std()


def steps_of(bundle: Path, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], dict[int, NDArray[np.float32]]]:
    """Logits after all tokens at once; and by position, of a prefill, a chunk after it, and decode steps."""
    backend = open_backend(Bundle.open(bundle), name="onnxruntime-cpu", max_seq=64, max_batch=1)
    whole = backend.prefill(0, tokens, 0).logits()[0].copy()
    steps = {11: backend.prefill(0, tokens[:12], 0).logits()[0].copy()}
    steps[19] = backend.prefill(0, tokens[12:20], 12).logits()[0].copy()
    for at in range(20, len(tokens)):
        steps[at] = backend.decode([int(tokens[at])], [at]).logits()[0].copy()
    backend.close()
    return whole, steps


def test_the_window_matters(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The windowed families above would fail without their window: the same weights give other logits."""
    windowed = Family("windowed", "mistral", {"sliding_window": WINDOW})
    folder = random_folder(windowed, tiny_checkpoint, tmp_path)
    ids = torch.randint(3, 32000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    logits = []
    for window in (WINDOW, None):
        model = AutoModelForCausalLM.from_pretrained(folder, sliding_window=window, attn_implementation="eager").eval()
        with torch.inference_mode():
            logits.append(model(ids).logits[0, -1])
    assert (logits[0] - logits[1]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("family", "named"),
    [
        (Family("gemma2", "gemma2", {"attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 32}), "softcap"),
        (
            Family("dynamic", "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
            "dynamic",
        ),
        (
            Family(
                "longrope",
                "phi3",
                {
                    "head_dim": 16,
                    "rope_parameters": {
                        "rope_type": "longrope",
                        "rope_theta": 1e4,
                        "short_factor": [1.0] * 8,
                        "long_factor": [2.0] * 8,
                        "original_max_position_embeddings": 64,
                    },
                    "original_max_position_embeddings": 64,
                },
            ),
            "longrope",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else "",
)
def test_what_cannot_be_lowered_is_refused_by_name(
    family: Family, named: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = random_folder(family, tiny_checkpoint, tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=named):
        export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(check=False))
    assert not (tmp_path / "bundle").exists()
