"""Every family is proved against PyTorch: prefill, a chunk after it, decode, and beyond the sliding window."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from families import Family, logits_by_position, random_folder
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

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
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONGROPE = {
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 64,
    },
    "original_max_position_embeddings": 64,
}
LOW_RANK = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 24}
LOW_RANK |= {"num_key_value_heads": 4}
MANY = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
DEEPSEEK = {
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
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
    Family(
        "gemma2-softcap",
        "gemma2",
        {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32, "sliding_window": WINDOW},
        ("ort", "canonical"),
    ),
    Family("llama-dynamic-within-its-context", "llama", {"rope_parameters": DYNAMIC_ROPE}),
    Family("phi3-longrope", "phi3", LONGROPE),
    Family("nanochat-norm-after-rotation-the-other-way", "nanochat"),
    Family("heads-of-20-channels", "llama", {"head_dim": 20}),
    Family("heads-of-40-channels", "llama", {"head_dim": 40}),
    Family("minicpm3-values-narrower-than-keys", "minicpm3", LOW_RANK),
]
#: Those whose projections and attention differ for the CPU kernels: norms, biases, windows, widths, rotation, low rank.
_ON_KERNELS = (
    "llama-bias",
    "mistral-window",
    "qwen3-qk-norm",
    "phi3-partial-rotary-window",
    "cohere-interleaved-rotary",
    "gemma3-two-rotary-bases-one-kv-head",
    "phi-partial-rotary-split-before",
    "gemma2-softcap",
    "olmo2-post-norm",
    "granite-multipliers",
    "heads-of-20-channels",
    "minicpm3-values-narrower-than-keys",
)
FAMILIES_ON_KERNELS = [family for family in FAMILIES if family.name in _ON_KERNELS]
#: Each family in `ort`, and in one of the other two, by turns: a trace takes seconds.
IN_DIALECTS = [
    (family, dialect)
    for number, family in enumerate(FAMILIES)
    for dialect in family.dialects
    if dialect == "ort" or dialect == ("canonical", "tensorrt")[number % 2] or len(family.dialects) < 3
]
EXPERTS = [
    Family("mixtral", "mixtral", {"num_local_experts": 4}, ("ort", "canonical")),
    Family(
        "qwen3-moe-weights-that-do-not-sum-to-one", "qwen3_moe", MANY | {"norm_topk_prob": False}, ("ort", "canonical")
    ),
    Family("olmoe", "olmoe", MANY | {"head_dim": 16}, ("ort", "canonical")),
    Family("granitemoe", "granitemoe", {"num_local_experts": 4}, ("ort", "canonical")),
    Family("gpt-oss-sinks-biases-clamps", "gpt_oss", {"num_local_experts": 4, "sliding_window": WINDOW}, ("ort",)),
    Family("deepseek-v3-groups-and-shared-expert", "deepseek_v3", LOW_RANK | DEEPSEEK, ("ort", "canonical")),
]


@pytest.mark.parametrize(
    ("family", "dialect"),
    [
        pytest.param(family, dialect, id=f"{family.name}-{dialect}")
        for family, dialect in IN_DIALECTS + [(family, dialect) for family in EXPERTS for dialect in family.dialects]
    ],
)
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
@pytest.mark.parametrize(
    ("family", "scheme", "error"),
    # The graph is rewritten alike for both: the second is for the numbers.
    [(family, "int8", 0.2) for family in FAMILIES_ON_KERNELS]
    + [(family, "int4", 1) for family in FAMILIES_ON_KERNELS[::3]],
    ids=lambda value: value.name if isinstance(value, Family) else str(value),
)
def test_quantized_on_the_kernels_is_as_near_to_pytorch_as_on_onnx_runtimes_operators(
    family: Family,
    scheme: str,
    error: float,
    tiny_checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = random_folder(family, tiny_checkpoint, tmp_path / "model")
    options = ExportOptions(quantization=BlockQuantization(scheme), check=False)
    export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", options)
    ids = torch.randint(3, 32000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = reference(ids).logits[0].numpy()
    errors = []
    for kernels in ("1", "0"):
        monkeypatch.setenv("STARLING_CPU_KERNELS", kernels)
        whole, steps = steps_of(tmp_path / "bundle", ids[0].numpy())
        if kernels == "1":  # how the tokens are cut changes no bit of our attention, and little of ONNX Runtime's
            apart = 0 if attends_in_kernels(tmp_path / "bundle") else 1e-4
            np.testing.assert_allclose(whole, steps[TOKENS - 1], rtol=0, atol=apart)
        errors.append(np.sqrt(np.mean([np.square(logits - expected[at]).mean() for at, logits in steps.items()])))
    assert errors[0] < 1.2 * errors[1]
    assert errors[0] < error * expected.std()


@pytest.mark.skipif(kernel_library() is None, reason="the CPU kernels are not built on this machine")
@pytest.mark.parametrize(
    ("family", "dtype", "share"),
    [(family, "fp16", 0.01) for family in FAMILIES_ON_KERNELS]
    + [(family, "bf16", 0.06) for family in FAMILIES_ON_KERNELS[::3]],
    ids=lambda value: value.name if isinstance(value, Family) else str(value),
)
def test_16_bits_on_the_kernels_are_pytorchs_within_their_rounding(
    family: Family, dtype: str, share: float, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = random_folder(family, tiny_checkpoint, tmp_path / "model")
    manifest = export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(dtype=dtype, check=False))
    if manifest["kernel_graph"] is None:
        assert not attends_like_the_kernels(tmp_path / "bundle")
        return
    ids = torch.randint(3, 32000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = reference(ids).logits[0].numpy()
    whole, steps = steps_of(tmp_path / "bundle", ids[0].numpy())
    np.testing.assert_array_equal(whole, steps[TOKENS - 1])  # how the tokens are cut changes no bit
    error = np.sqrt(np.mean([np.square(logits - expected[at]).mean() for at, logits in steps.items()]))
    assert error < share * expected.std()


def attends_like_the_kernels(bundle: Path) -> bool:
    """Whether the plain graph has nothing that ours lack: experts, sinks, soft caps, heads of odd sizes."""
    nodes = onnx.load(bundle / "model.onnx", load_external_data=False).graph.node
    past = onnx.load(bundle / "model.onnx", load_external_data=False).graph.input
    head_dim = next(i.type.tensor_type.shape.dim[3].dim_value for i in past if i.name.startswith("past_key_values"))
    attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    lacking = any(len(node.input) > 9 or "softcap" in {a.name for a in node.attribute} for node in attention)
    return head_dim % 16 == 0 and not lacking and not any(node.op_type in ("MoE", "QMoE") for node in nodes)


def attends_in_kernels(bundle: Path) -> bool:
    """Whether the graph for the kernels has their attention, or ONNX Runtime's because of what theirs lacks."""
    nodes = onnx.load(bundle / "model_kernels.onnx", load_external_data=False).graph.node
    return {node.domain for node in nodes if node.op_type == "GroupQueryAttention"} == {"starling"}


def steps_of(bundle: Path, tokens: NDArray[np.int64]) -> tuple[NDArray[np.float32], dict[int, NDArray[np.float32]]]:
    """Logits after all tokens at once; and by position, of a prefill, a chunk after it, and decode steps."""
    backend = open_backend(Bundle.open(bundle), name="onnxruntime-cpu", max_seq=64, max_batch=1)
    whole = backend.prefill(0, tokens, 0).logits()[0].copy()
    steps = logits_by_position(backend, tokens)
    backend.close()
    return whole, steps


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("family", EXPERTS, ids=lambda f: f.name)
def test_experts_in_blocks_are_near_to_pytorch(
    family: Family, scheme: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Routed by nearly equal scores a token may take another expert: so the median over the positions is compared."""
    folder = random_folder(family, tiny_checkpoint, tmp_path / "model")
    options = ExportOptions(quantization=BlockQuantization(scheme), check=False)
    export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", options)
    ids = torch.randint(3, 32000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        expected = reference(ids).logits[0].numpy()
    _, steps = steps_of(tmp_path / "bundle", ids[0].numpy())
    errors = [np.sqrt(np.square(logits - expected[at]).mean()) for at, logits in steps.items()]
    assert np.median(errors) < {"int8": 0.15, "int4": 0.9}[scheme] * expected.std()


@pytest.mark.parametrize(
    ("family", "named"),
    [
        (Family("experts", "mixtral", {"num_local_experts": 4}), "mixtures of experts"),
        (Family("softcap", "gemma2", {"query_pre_attn_scalar": 32}), "soft cap"),
    ],
    ids=lambda value: value.name if isinstance(value, Family) else "",
)
def test_what_tensorrt_does_not_have_is_refused_by_name(
    family: Family, named: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = random_folder(family, tiny_checkpoint, tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=named):
        export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(dialect="tensorrt", check=False))


def test_sinks_are_refused_by_name_where_there_is_no_operator(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = random_folder(Family("sinks", "gpt_oss", {"num_local_experts": 4}), tiny_checkpoint, tmp_path / "model")
    options = ExportOptions(dialect="canonical", check=False)
    with pytest.raises(UnsupportedModelError, match="attention sinks"):
        export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", options)


@pytest.mark.parametrize("dialect", ["ort", "canonical", "tensorrt"])
def test_a_session_for_long_sequences_rotates_by_the_long_factors(
    dialect: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """PyTorch takes them for a whole sequence of more than 64 positions, as longrope says."""
    folder = random_folder(Family("longrope", "phi3", LONGROPE), tiny_checkpoint, tmp_path / "model")
    manifest = export_bundle(
        open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(dialect=dialect, check=False)
    )
    assert any("at most 64 positions" in note for note in manifest["notes"])
    ids = torch.randint(3, 32000, (1, 80), generator=torch.Generator().manual_seed(1))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        long, short = reference(ids).logits[0].numpy(), reference(ids[:, :40]).logits[0].numpy()
    backend = open_backend(Bundle.open(tmp_path / "bundle"), name="onnxruntime-cpu", max_seq=96, max_batch=1)
    backend.prefill(0, ids[0, :40].numpy(), 0)
    assert np.abs(backend.prefill(0, ids[0, 40:].numpy(), 40).logits()[0] - long[-1]).max() < 1e-3
    backend.close()
    assert np.abs(long[39] - short[39]).max() > 0.05  # the two kinds differ


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
        (Family("chunks", "llama4_text", {"attention_chunk_size": 16} | MANY), "llama4|Llama4"),
        (Family("convolutions", "lfm2", {"layer_types": ["conv", "full_attention", "conv"]}), "state other than keys"),
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


class _InverseErrorFunction(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(x)


def test_an_operator_that_onnx_lacks_is_named(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ACT2FN, "erfinv", _InverseErrorFunction)
    folder = random_folder(Family("erfinv", "llama", {"hidden_act": "erfinv"}), tiny_checkpoint, tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match=r"traced \(No ONNX function found for .*erf_?inv") as refused:
        export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(check=False))
    assert str(refused.value).isprintable()
