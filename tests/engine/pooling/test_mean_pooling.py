"""Embeddings by the mean over a text's tokens, against PyTorch's hidden states and sentence-transformers' formula."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_scorers import padded, texts

from starling.engine.bundle.manifest import Bundle
from starling.engine.engine import Engine
from starling.engine.errors import BundleError, CheckpointError, UnsupportedModelError
from starling.engine.pooling_loop import PoolingLoop
from starling.export.check.torch_reference import load_reference
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.embedding_files import embedding_of
from starling.export.checkpoints.scoring_models import for_task
from starling.export.exporter import ExportOptions, export_bundle
from starling.serving.http.scoring_bodies import embedding_request

BEGINNING = texts((120,), seed=5)[0]
#: Of many lengths, one longer than a run, some that begin alike.
ROWS = [*texts((1, 2, 5, 17, 40, 300, 40)), *([*BEGINNING, *row] for row in texts((3, 50, 7), seed=6))]
POOLING_FILE = "1_Pooling/config.json"


@pytest.fixture(scope="module")
def bundle(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mean") / "bundle"
    checkpoint = for_task(tiny_checkpoint, "embed", "mean")
    parity = export_bundle(checkpoint, folder, ExportOptions(check=True))["parity"]
    assert parity["max_abs_diff"] < 1e-4  # PyTorch's own mean
    return folder


@pytest.fixture(scope="module")
def expected(tiny_checkpoint: Checkpoint) -> NDArray[np.float32]:
    """sentence-transformers' mean of one padded batch: what the attention mask leaves out counts for nothing."""
    model = load_reference(tiny_checkpoint.config, tiny_checkpoint.tensors)
    ids, mask = padded(ROWS, 0), padded([[1] * len(row) for row in ROWS], 0)
    with torch.inference_mode():
        hidden = model.base_model(ids, attention_mask=mask, use_cache=False)[0].float()  # type: ignore[operator]
    wide = mask.unsqueeze(-1).float()
    found: NDArray[np.float32] = ((hidden * wide).sum(1) / wide.sum(1)).numpy()
    return found


@pytest.mark.parametrize("run_tokens", [512, 100, 16])
def test_the_mean_is_over_a_texts_own_tokens(bundle: Path, expected: NDArray[np.float32], run_tokens: int) -> None:
    with Engine(bundle, max_batch=4) as engine:
        engine.pooler.backend.run_tokens = run_tokens
        assert np.abs(engine.embed_texts(ROWS) - expected).max() < 1e-4
        with PoolingLoop(engine) as loop:
            prepared = [engine.pooler.prepare(row) for row in ROWS]
            assert np.abs(loop.submit(prepared).result(timeout=60) - expected).max() < 1e-4
    assert expected.std() > 0.05


def test_a_texts_last_token_alone_gives_another_vector(embedding_bundle: Path, expected: NDArray[np.float32]) -> None:
    with Engine(embedding_bundle) as engine:
        last = engine.embed_texts(ROWS)
    assert np.abs(last[0] - expected[0]).max() < 1e-4, "a text of one token has the same"
    assert np.abs(last[1:] - expected[1:]).max(axis=1).min() > 0.01


def write(folder: Path, modes: Sequence[str], modules: Sequence[str] | None) -> Path:
    (folder / "1_Pooling").mkdir()
    known = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    switches: dict[str, Any] = {f"pooling_mode_{mode}": mode in modes for mode in known}
    (folder / POOLING_FILE).write_text(json.dumps({"word_embedding_dimension": 8, **switches}))
    if modules is not None:
        listed = [{"idx": i, "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(modules)]
        (folder / "modules.json").write_text(json.dumps(listed))
    return folder


@pytest.mark.parametrize(
    ("modes", "modules", "found"),
    [
        (["mean_tokens"], ["Transformer", "Pooling", "Normalize"], ("mean", True)),
        (["mean_tokens"], ["Transformer", "Pooling"], ("mean", False)),
        (["lasttoken"], ["Transformer", "Pooling", "Normalize"], ("last", True)),
        (["lasttoken"], None, ("last", True)),
        ([], None, ("last", True)),
    ],
)
def test_sentence_transformers_files_decide(
    tmp_path: Path, modes: list[str], modules: list[str] | None, found: tuple[str, bool]
) -> None:
    assert embedding_of(write(tmp_path, modes, modules), None) == found


def test_what_is_said_goes_before_the_files(tmp_path: Path) -> None:
    write(tmp_path, ["cls_token"], ["Transformer", "Pooling"])
    assert embedding_of(tmp_path, "last") == ("last", False)
    assert embedding_of(None, "mean") == ("mean", True)


def test_other_ways_to_pool_are_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, ["cls_token"], None)
    with pytest.raises(UnsupportedModelError, match=r"config\.json says pooling_mode_cls_token: only"):
        embedding_of(tmp_path, None)
    (tmp_path / "modules.json").write_text('[{"type": "sentence_transformers.models.Dense"}]')
    with pytest.raises(UnsupportedModelError, match=r"modules\.json has the module .*\.Dense: only"):
        embedding_of(tmp_path, "mean")
    cases = {"{}": "is not a JSON list, but a dict", "[": "is not JSON", "[5]": "has the module None"}
    for content, problem in cases.items():
        (tmp_path / "modules.json").write_text(content)
        with pytest.raises((CheckpointError, UnsupportedModelError), match=problem):
            embedding_of(tmp_path, None)


def test_a_folder_without_normalize_is_answered_raw_by_default(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    write(tmp_path, ["mean_tokens"], ["Transformer", "Pooling"])
    made = for_task(replace(tiny_checkpoint, path=tmp_path), "embed").pooling
    assert made is not None
    assert (made.read_at, made.normalize) == ("mean", False)
    body = {"input": "a"}
    assert not embedding_request(body, ["m"], normalize=made.normalize).activation
    assert embedding_request({**body, "use_activation": True}, ["m"], normalize=made.normalize).activation


def test_scores_have_no_mean(bundle: Path, reward_bundle: Path, tmp_path: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.pooling is not None
    assert (opened.pooling.read_at, opened.pooling.normalize) == ("mean", True)
    broken = tmp_path / "bundle"
    broken.mkdir()
    for file in reward_bundle.iterdir():
        if file.is_file():
            (broken / file.name).hardlink_to(file)
    manifest = json.loads((broken / "bundle.json").read_text())
    manifest["pooling"]["read_at"] = "mean"
    (broken / "bundle.json").unlink()
    (broken / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"pooling\.read_at"):
        Bundle.open(broken)
