"""docs/models.md says what the exporter does: its lines are run again for a few types, one of each kind of answer."""

from importlib.metadata import version
from pathlib import Path

import pytest
from model_sweep import judge, model_types
from models_page import PAGE, read_page, write_page

from starling.export.checkpoints.checkpoint import Checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "mixtral", "lfm2", "falcon"])
def test_the_page_says_what_the_exporter_does(model_type: str, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    found = judge(model_type, tiny_checkpoint.tokenizer.tokenizer_json, tmp_path)
    verdict, why = read_page(PAGE)[model_type]
    assert found.verdict == verdict
    if verdict == "refused":
        assert found.why == why


@pytest.mark.skipif(not version("transformers").startswith("5.23."), reason="the page is of transformers 5.23")
def test_the_page_has_every_type() -> None:
    assert list(read_page(PAGE)) == model_types()


def test_the_page_has_nothing_that_is_wrong_or_crashes() -> None:
    lines = read_page(PAGE)
    assert not [name for name, (verdict, _) in lines.items() if verdict in ("wrong", "crash")]


def test_the_page_is_as_the_command_writes_it(tmp_path: Path) -> None:
    write_page(tmp_path / "again.md", read_page(PAGE))
    assert (tmp_path / "again.md").read_text() == PAGE.read_text()


def test_a_refusal_names_what_is_missing() -> None:
    for name, (verdict, why) in read_page(PAGE).items():
        if verdict == "refused":
            assert "get it again" not in why, name
            assert len(why) > 30, name
