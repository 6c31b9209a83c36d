"""A bundle against the logits of PyTorch that its export kept: what is right passes, each kind of fault is named."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import copy_bundle, edit_manifest, replace_recorded

from starling.engine.backends.backend import Backend, StepOutput, Tokens
from starling.engine.backends.open_backend import open_backend
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BundleError
from starling.engine.verification import LOGITS_FILE, compared_positions, verify

ROWS = 3


@pytest.fixture
def opened(tiny_bundle: Path) -> Iterator[Backend]:
    bundle = Bundle.open(tiny_bundle)
    backend = open_backend(bundle, name="onnxruntime-cpu", max_seq=64, max_batch=ROWS, threads=1)
    yield backend
    backend.close()


class Altered:
    """A backend of which one thing is wrong: `logits` changes a step's logits, `choose` its tokens."""

    def __init__(self, backend: Backend, *, logits: Any = None, choose: Any = None) -> None:
        self._backend, self._logits, self._choose = backend, logits, choose

    def prefill(self, row: int, tokens: Tokens, start: int) -> StepOutput:
        return self._altered(self._backend.prefill(row, tokens, start))

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> StepOutput:
        return self._altered(self._backend.decode(tokens, positions))

    def _altered(self, output: StepOutput) -> Any:
        logits, tokens = output.logits().copy(), list(output.tokens())
        logits = logits if self._logits is None else self._logits(logits)
        tokens = tokens if self._choose is None else self._choose(tokens)
        return type("Output", (), {"logits": lambda _: logits, "tokens": lambda _: tokens})()


@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_bundle_is_right_where_it_was_exported(tiny_bundle: Path, opened: Backend, rows: int) -> None:
    found = verify(Bundle.open(tiny_bundle), opened, rows)
    assert found.problem is None
    assert (found.rows, found.positions, found.top1_agreement) == (rows, len(compared_positions(48)), 1.0)
    assert found.mean_kl is not None
    assert found.mean_kl < 1e-6  # what rounding PyTorch's logits to float16 costs


def test_logits_of_another_model_are_wrong(tiny_bundle: Path, opened: Backend) -> None:
    other = Altered(opened, logits=lambda logits: np.flip(logits * 20, axis=-1))
    found = verify(Bundle.open(tiny_bundle), other, ROWS)  # type: ignore[arg-type]
    assert found.problem is not None
    assert "mean KL from PyTorch" in found.problem


def test_one_row_of_several_that_is_wrong_is_seen(tiny_bundle: Path, opened: Backend) -> None:
    def last_row(logits: Any) -> Any:
        logits[1:] = np.flip(logits[1:] * 20, axis=-1)
        return logits

    other = Altered(opened, logits=last_row)
    assert verify(Bundle.open(tiny_bundle), other, 1).problem is None  # type: ignore[arg-type]
    assert verify(Bundle.open(tiny_bundle), other, ROWS).problem is not None  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_logit_that_is_no_number_is_wrong(tiny_bundle: Path, opened: Backend, value: float) -> None:
    def spoilt(logits: Any) -> Any:
        logits[0, 7] = value
        return logits

    found = verify(Bundle.open(tiny_bundle), Altered(opened, logits=spoilt))  # type: ignore[arg-type]
    assert found.problem == "its logits are not all finite numbers"
    assert found.mean_kl is None


@pytest.mark.parametrize(
    ("chosen", "problem"), [(3, "not the likeliest of its own logits"), (-1, "outside the vocabulary")]
)
def test_a_wrong_choice_of_tokens_is_seen_where_the_logits_are_right(
    tiny_bundle: Path, opened: Backend, chosen: int, problem: str
) -> None:
    other = Altered(opened, choose=lambda tokens: [chosen] * len(tokens))
    assert problem in str(verify(Bundle.open(tiny_bundle), other).problem)  # type: ignore[arg-type]


def test_a_bundle_without_a_reference_says_how_to_get_one(tiny_tensorrt_bundle: Path, opened: Backend) -> None:
    with pytest.raises(BundleError, match="export it again with --check"):
        verify(Bundle.open(tiny_tensorrt_bundle), opened)


@pytest.mark.parametrize(
    "content", [np.zeros((2, 2), np.float16), np.zeros((18, 32002), np.float32), np.array([{}], object), b"no array"]
)
def test_a_broken_reference_is_refused(tiny_bundle: Path, opened: Backend, tmp_path: Path, content: Any) -> None:
    written = io.BytesIO(content if isinstance(content, bytes) else b"")
    if isinstance(content, np.ndarray):
        np.save(written, content, allow_pickle=True)
    bundle = copy_bundle(tiny_bundle, tmp_path / "b")
    replace_recorded(bundle, LOGITS_FILE, written.getvalue())
    with pytest.raises(BundleError, match=rf"{LOGITS_FILE} .*export .* again"):
        verify(Bundle.open(bundle), opened)


@pytest.mark.parametrize(
    "changed",
    [
        {"file": "elsewhere.npy"},
        {"file": 5},
        {"tokens": [-1]},
        {"tokens": ["a"]},
        {"tokens": list(range(9)), "file": LOGITS_FILE},
        {"mean_kl": "small"},
    ],
)
def test_a_broken_record_of_the_reference_is_refused(
    tiny_bundle: Path, tmp_path: Path, opened: Backend, changed: dict[str, Any]
) -> None:
    bundle = copy_bundle(tiny_bundle, tmp_path / "b")
    edit_manifest(bundle, verification=Bundle.open(tiny_bundle).raw["verification"] | changed)
    with pytest.raises(BundleError):
        verify(Bundle.open(bundle), opened)
