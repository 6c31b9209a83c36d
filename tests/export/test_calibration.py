"""Calibration: what is measured, in how little memory, and what is said of a file that cannot be used."""

import json
from pathlib import Path

import pytest
import torch
from command_line import refusal
from families import Family, random_folder
from torch import Tensor, nn

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError
from starling.export.bundle_folder import write_tokenizer
from starling.export.check.sample_texts import (
    CALIBRATION,
    HELD_OUT,
    TextEncoder,
    TokenRows,
    calibration_rows,
    held_out_rows,
    read_texts,
)
from starling.export.check.torch_reference import load_reference
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.quantization.calibration import input_absmax
from starling.export.quantization.streamed_model import StreamedModel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tiny_checkpoint.tokenizer, tiny_checkpoint.generation)
    return TextEncoder(folder, tiny_checkpoint.config.vocab_size)


@pytest.fixture(scope="module")
def random_model(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = random_folder(Family("llama", "llama"), tiny_checkpoint, tmp_path_factory.mktemp("model"))
    return open_checkpoint(str(folder))


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    ids = torch.randint(3, 32000, (3, 24), generator=torch.Generator().manual_seed(3))
    return TokenRows(ids, (24, 16, 9))


def test_the_greatest_inputs_are_those_of_the_whole_model(random_model: Checkpoint, rows: TokenRows) -> None:
    found = input_absmax(random_model.config, random_model.tensors, rows)
    model, expected = load_reference(random_model.config, random_model.tensors), {}

    def look(name: str, x: Tensor) -> None:
        expected[name] = torch.maximum(expected.get(name, torch.zeros(1)), x[0].abs().amax(dim=0))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=f"{name}.weight": look(name, x[0]))
    with torch.inference_mode():
        for row, length in zip(rows.ids, rows.lengths, strict=True):
            model(row[None, :length], use_cache=False)  # the padding is left out
    assert found.keys() == expected.keys()
    for name, absmax in found.items():
        torch.testing.assert_close(absmax, expected[name], rtol=1e-4, atol=1e-5)


def test_one_module_is_in_memory_at_a_time(random_model: Checkpoint, rows: TokenRows) -> None:
    streamed = StreamedModel(random_model.config, random_model.tensors)
    most = 0

    def count(*_: object) -> None:
        nonlocal most
        real = [p for p in streamed.model.parameters() if not p.is_meta]
        owners = [m for m in streamed.model.modules() if any(not p.is_meta for p in m.parameters(recurse=False))]
        most = max(most, sum(p.nbytes for p in real))
        assert len(owners) <= 1

    for module in streamed.model.modules():
        module.register_forward_pre_hook(count)
        module.register_forward_hook(count)
    streamed.run(rows.ids)
    assert most == 4 * 128 * 64  # the query's projection; of the embedding no more than 72 of its 32002 rows
    assert all(p.is_meta for p in streamed.model.parameters())


def test_every_tensor_but_lm_head_is_read_once(random_model: Checkpoint, rows: TokenRows) -> None:
    seen: list[tuple[int, int]] = []
    StreamedModel(random_model.config, random_model.tensors, lambda *at: seen.append(at)).run(rows.ids)
    decoder = [n for n in random_model.tensors.names() if n != "lm_head.weight"]
    total = 4 * sum(int(torch.Size(random_model.tensors.shape(n)).numel()) for n in decoder)
    assert seen[-1] == (total, total)


def test_the_built_in_text_is_thousands_of_tokens_and_not_the_held_out_one(encoder: TextEncoder) -> None:
    rows = calibration_rows(CALIBRATION, encoder, 100_000, 8192)
    assert rows.tokens > 4000
    assert all(row[0] == 1 for row in rows.ids.tolist())  # each begins with <s>, as what the model answers does
    held = {json.dumps(document) for document in read_texts(HELD_OUT)}
    assert not held & {json.dumps(document) for document in read_texts(CALIBRATION)}
    assert [len(row) for row in held_out_rows(encoder, 129)] == [129] * 4


def test_a_chat_goes_through_the_template(encoder: TextEncoder) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert 32000 in encoder.ids({"messages": messages})  # <|end_of_turn|>
    assert 32000 not in encoder.ids({"text": "Hello"})
    system_first = [{"role": "narrator", "content": "Hello"}]  # no role of this template's
    assert encoder.ids({"messages": system_first})


def test_plain_text_and_json_lines_give_the_same_rows(encoder: TextEncoder, tmp_path: Path) -> None:
    text = "The ferry was late again, and nobody on the quay seemed to mind. " * 30
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n\n")
    plain, lines = (calibration_rows(tmp_path / f"a.{kind}", encoder, 300, 8192) for kind in ("txt", "jsonl"))
    assert torch.equal(plain.ids, lines.ids)
    assert plain.tokens == 300
    assert plain.lengths == (256, 44)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "is empty: give a file with some pages of text"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.txt", b"caf\xe9 au lait", r"is not UTF-8 \(byte 3\)"),
        ("a.txt", b"Too short.", r"gives only 0 tokens, calibration wants at least 256"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"txt": "x"}', 'line 1 has neither "text" nor "messages"'),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', 'neither "text" nor "messages"'),
    ],
)
def test_a_file_that_cannot_be_used(name: str, content: bytes, said: str, encoder: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        calibration_rows(tmp_path / name, encoder, 4096, 8192)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    command = ("export", "random:starling-tiny", tmp_path / "b", "--dialect", "tensorrt", "--quant", "w8a8")
    line = refusal(*command, "--calibration", tmp_path / "mine.txt")
    assert line == f"{tmp_path}/mine.txt: no such file; give a text file, or a .jsonl file of lines with a text"
    assert "cannot be read (Is a directory)" in refusal(*command, "--calibration", tmp_path)
    assert not (tmp_path / "b").exists()


def test_the_bundle_names_the_text_it_was_calibrated_on(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    from starling.export.exporter import ExportOptions, export_bundle
    from starling.export.quantization.calibration_choice import Calibration
    from starling.export.quantization.qdq_settings import QdqQuantization

    mine = tmp_path / "mine.txt"
    mine.write_text("The ferry was late again, and nobody on the quay seemed to mind. " * 30)
    options = ExportOptions(
        dialect="tensorrt", quantization=QdqQuantization("w8a8"), calibration=Calibration(mine, 300), check=False
    )
    manifest = export_bundle(tiny_checkpoint, tmp_path / "b", options)
    assert manifest["quantization"]["calibration"] == {"text": "mine.txt", "tokens": 300, "rows": 2}
    opened = Bundle.open(tmp_path / "b").quantization
    assert opened is not None
    assert (opened.scheme, opened.smoothing, opened.block_size, opened.kept) == ("w8a8", 0.8, None, ())
