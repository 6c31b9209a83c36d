"""`starling evaluate` says how well a bundle predicts a text, and how far it is from a reference."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import document, refusal, succeed

from starling.engine.bundle.manifest import Bundle
from starling.engine.divergence import QualityTotals
from starling.engine.errors import UserError
from starling.engine.text.tokenizer import Tokenizer
from starling.profiling.quality.evaluation_text import built_in_text, windows
from starling.profiling.quality.precision_table import markdown_table, read_results
from starling.profiling.quality.stored_logits import StoredLogits

pytestmark = pytest.mark.slow

SHORT = ("--window", "48", "--context", "8", "--text-tokens", "150", "--threads", "1")


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An evaluation without a reference, and the logits that it kept."""
    kept = tmp_path_factory.mktemp("logits") / "fp32.npz"
    result = document("evaluate", tiny_bundle, *SHORT, "--save-logits", kept, "--logits-dtype", "float32")
    return result, kept


def test_perplexity_is_pytorchs_on_the_same_text(demo_bundle: Path, demo_checkpoint: Any) -> None:
    from starling.export.check.torch_reference import load_reference

    result = document("evaluate", demo_bundle, "--window", "32", "--context", "4", "--text-tokens", "64")
    bundle = Bundle.open(demo_bundle)
    tokenizer = Tokenizer.load(bundle.folder, bundle.architecture.vocab_size)
    rows = torch.tensor(tokenizer.encode(built_in_text())[:64]).reshape(2, 32)
    with torch.inference_mode():
        logits = load_reference(demo_checkpoint.config, demo_checkpoint.tensors)(rows, use_cache=False).logits[:, 3:-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), rows[:, 4:].reshape(-1))
    assert result["positions"] == 2 * 28
    assert result["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-4)
    assert result["divergence"] is None


def test_a_bundle_does_not_diverge_from_itself(tiny_bundle: Path) -> None:
    far = document("evaluate", tiny_bundle, *SHORT, "--reference", tiny_bundle)["divergence"]
    assert (far["mean_kl"], far["max_kl"], far["top1_agreement"], far["max_abs_logit_diff"]) == (0, 0, 1, 0)


def test_a_quantized_bundle_diverges_a_little(demo_int8_bundle: Path, demo_bundle: Path) -> None:
    result = document(
        "evaluate", demo_int8_bundle, "--reference", demo_bundle, "--window", "64", "--text-tokens", "128"
    )
    far = result["divergence"]
    assert 1e-5 < far["mean_kl"] < 0.02
    assert far["mean_kl"] <= far["max_kl"]
    assert 0.8 < far["top1_agreement"] <= 1
    assert result["perplexity"] == pytest.approx(far["reference_perplexity"], rel=0.05)


def test_stored_logits_are_as_good_a_reference_as_their_bundle(alone: Any, tiny_bundle: Path) -> None:
    result, kept = alone
    far = document("evaluate", tiny_bundle, *SHORT, "--reference-logits", kept)["divergence"]
    assert (far["max_abs_logit_diff"], far["top1_agreement"]) == (0, 1)
    assert far["reference_perplexity"] == pytest.approx(result["perplexity"])


def test_windows_decoded_together_or_one_by_one_agree(alone: Any, tiny_bundle: Path) -> None:
    single = document("evaluate", tiny_bundle, *SHORT, "--max-batch", "1")
    assert single["perplexity"] == pytest.approx(alone[0]["perplexity"], rel=1e-5)
    assert single["positions"] == alone[0]["positions"] == 3 * 40


def test_people_get_lines_and_programs_a_file(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("The harbour was empty but for one boat, and the boat was not for sale.", encoding="utf-8")
    text = succeed("evaluate", tiny_bundle, "--text", file, "--context", "2", "--output", tmp_path / "figures.json")
    assert "perplexity" in text
    assert "own.txt" in text
    written = json.loads((tmp_path / "figures.json").read_text())
    assert (written["format"], written["windows"]) == ("starling-evaluation", 1)
    assert written["positions"] == written["window_tokens"] - 2


def test_figures_are_those_of_the_definitions() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.25, 0.5, 0.25])
    totals = QualityTotals()
    totals.add(np.log(q)[None].astype(np.float32), [0], np.log(p)[None].astype(np.float32) + 3)
    totals.add(np.log(p)[None].astype(np.float32), [1], np.log(p)[None].astype(np.float32))
    quality = totals.quality()
    assert quality.divergence is not None
    kl = float((p * np.log(p / q)).sum())
    assert quality.positions == 2
    assert quality.perplexity == pytest.approx((1 / 0.25 * 1 / 0.2) ** 0.5)
    assert quality.divergence.reference_perplexity == pytest.approx((1 / 0.7 * 1 / 0.2) ** 0.5)
    assert (quality.divergence.mean_kl, quality.divergence.max_kl) == pytest.approx((kl / 2, kl), rel=1e-5)
    assert quality.divergence.top1_agreement == 0.5


def test_a_text_becomes_windows_that_do_not_overlap_and_begin_as_the_model_expects(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    tokenizer = Tokenizer.load(bundle.folder, bundle.architecture.vocab_size)
    ids = tokenizer.encode(built_in_text())
    bos = bundle.tokens.bos
    assert ids[0] == bos
    rows = windows(tokenizer, built_in_text(), bos=bos, window=100)
    assert (rows[:, 0] == bos).all()
    assert rows[:, 1:].reshape(-1).tolist() == ids[1 : 1 + 99 * len(rows)]
    assert len(ids) - 1 - 99 * len(rows) < 99


def test_stored_logits_come_back_as_they_were(tmp_path: Path) -> None:
    stored = StoredLogits.empty(np.arange(12).reshape(2, 6), 2, 7, "float16")
    stored.logits[1, 3] = 0.5
    stored.write(tmp_path / "logits")
    read = StoredLogits.read(tmp_path / "logits")
    assert (read.context, read.logits.dtype, read.logits.shape) == (2, np.float16, (2, 4, 7))
    assert [(rows.start, at) for rows, at, _ in read.steps(batch=1)][-1] == (1, 4)
    assert [logits for _, _, logits in read.steps(batch=2)][3][1].tolist() == [0.5] * 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--reference", "a", "--reference-logits", "b"), "are two references: give one"),
        (("--reference-logits", "no.npz"), "no.npz cannot be read"),
        (("--text", "no.txt"), "no.txt cannot be read"),
        (("--window", "16"), "--window is 16: give more than the 16 tokens of --context"),
        (("--max-batch", "0"), "Invalid value for '--max-batch': 0 is not in the range x>=1"),
        (("--logits-dtype", "float32"), "--logits-dtype is the type of logits that are kept: add --save-logits"),
        (("--save-logits", "nowhere/x.npz"), "nowhere is no folder"),
    ],
)
def test_impossible_settings(options: tuple[str, ...], expected: str, tiny_bundle: Path) -> None:
    assert expected in refusal("evaluate", tiny_bundle, *options)


def test_a_reference_of_another_text_is_refused(alone: Any, tiny_bundle: Path) -> None:
    line = refusal("evaluate", tiny_bundle, *SHORT, "--text-tokens", "100", "--reference-logits", alone[1])
    assert "the stored logits are of [3, 48] tokens" in line


def test_a_reference_of_another_model_is_refused(demo_bundle: Path, tiny_bundle: Path) -> None:
    line = refusal("evaluate", tiny_bundle, *SHORT, "--reference", demo_bundle)
    assert "as other tokens" in line


def test_a_file_that_holds_no_logits_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no logits")
    assert "holds no logits" in refusal("evaluate", tiny_bundle, "--reference-logits", tmp_path / "text.npz")


def test_the_readmes_table_is_made_of_results(alone: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    run = ("--prompt-tokens", "8", "--new-tokens", "3", "--repeats", "1", "--no-cold-start")
    profile = document("profile", tiny_bundle, *run)
    quantized = {
        **alone[0],
        "bundle": {**alone[0]["bundle"], "bytes": 1_000_000},
        "divergence": {"mean_kl": 0.00391, "max_kl": 0.09, "top1_agreement": 0.9625},
    }
    for name, evaluation in (("int8", quantized), ("fp32", alone[0])):
        (tmp_path / f"{name}.evaluate.json").write_text(json.dumps(evaluation))
        (tmp_path / f"{name}.profile.json").write_text(json.dumps(profile))
    lines = markdown_table(read_results(tmp_path)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| fp32", "| int8"]
    assert "| int8 | 1 MB | 0.0039 | 0.09 | 96.2% |" in lines[3]
    with pytest.raises(UserError, match=r"no file \*\.evaluate\.json"):
        read_results(tmp_path / "nowhere")
