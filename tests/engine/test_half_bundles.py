"""Bundles of 16-bit weights on the CPU kernels, against PyTorch and against themselves."""

from pathlib import Path

import numpy as np
import pytest

from starling.engine.bundle.manifest import Bundle
from starling.engine.engine import Engine
from starling.engine.kernels import kernel_library, require_kernel_library
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.exporter import ExportOptions, export_bundle

pytestmark = pytest.mark.skipif(kernel_library() is None, reason="the CPU kernels are not built on this machine")


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def half_bundle(request: pytest.FixtureRequest, tiny_checkpoint: Checkpoint, bundles: Path) -> Path:
    """starling-tiny with weights and KV cache of 16 bits, compared with PyTorch."""
    out = bundles / f"tiny-{request.param}"
    export_bundle(tiny_checkpoint, out, ExportOptions(dtype=request.param, check=True))
    return out


class TestInTheEngine:
    PROMPTS = ("The three primary colours are", "Water boils at", "In the year 1969,", "A prime number is")

    def test_a_bundle_of_16_bits_runs_on_them(self, half_bundle: Path) -> None:
        with Engine(half_bundle, max_seq=64) as engine:
            bundle, library = Bundle.open(half_bundle), require_kernel_library()
            assert engine.backend.kernels == library.instruction_set_of(bundle.dtype)  # type: ignore[attr-defined]
            assert bundle.kv_cache.dtype == {"fp16": "float16", "bf16": "bfloat16"}[bundle.dtype]
            assert bundle.parity is not None
            assert bundle.parity["kernels"] == engine.backend.kernels  # type: ignore[attr-defined]

    def test_logits_are_pytorchs_within_the_rounding_of_the_weights(self, half_bundle: Path) -> None:
        parity, most = Bundle.open(half_bundle).parity, {"fp16": 1e-6, "bf16": 1e-4}
        assert parity is not None
        assert 0 < parity["mean_kl"] < most[Bundle.open(half_bundle).dtype]

    def test_logits_are_the_same_bits_however_the_prompt_is_cut(self, half_bundle: Path) -> None:
        with Engine(half_bundle, max_seq=256, max_batch=2) as engine:
            backend, tokens = engine.backend, np.arange(5, 205)
            whole = backend.prefill(0, tokens, 0).logits()[0].copy()
            for first, last in ((0, 90), (90, 97), (97, 199)):
                backend.prefill(1, tokens[first:last], first)
            np.testing.assert_array_equal(backend.prefill(1, tokens[199:], 199).logits()[0], whole)

    def test_greedy_text_is_the_same_alone_and_in_company(self, half_bundle: Path) -> None:
        with Engine(half_bundle, max_seq=128, max_batch=4) as engine:
            alone = [engine.generate(prompt, max_tokens=24).tokens for prompt in self.PROMPTS]
            assert [result.tokens for result in engine.generate(list(self.PROMPTS), max_tokens=24)] == alone

    def test_drafts_are_verified_in_several_rows_at_once(self, half_bundle: Path) -> None:
        with Engine(half_bundle, max_seq=128, max_batch=4) as engine:
            assert engine.backend.verified_rows == 4


@pytest.mark.slow
def test_bf16_of_a_real_model_is_within_its_bar(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    manifest = export_bundle(demo_checkpoint, tmp_path / "demo", ExportOptions(dtype="bf16"))
    assert manifest["parity"]["mean_kl"] < 0.0006
