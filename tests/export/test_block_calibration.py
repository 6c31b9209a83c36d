"""int4 by calibration: what the pass over the text leaves behind, in how little memory, and what it is worth."""

import gc
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import refusal
from families import Family, random_folder
from torch import Tensor, nn

from starling.engine.errors import UserError
from starling.export.check.sample_texts import CALIBRATION, HELD_OUT, TokenRows, read_texts
from starling.export.check.torch_reference import load_reference
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.block_calibration import LEAST_EXPERT_TOKENS, BlockCalibration
from starling.export.quantization.block_store import BlockStore
from starling.export.quantization.blocks import BlockQuantization, QuantizedRows, dequantize, quantize_rows
from starling.export.quantization.calibration_choice import NONE, Calibration
from starling.profiling.quality.evaluation_text import built_in_text

INT4 = BlockQuantization("int4")


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = random_folder(Family("llama", "llama"), tiny_checkpoint, tmp_path_factory.mktemp("model"))
    return open_checkpoint(str(folder))


def text_rows(count: int, length: int, vocabulary: int = 60) -> TokenRows:
    """Few different tokens, so that inputs are alike, as those of text are."""
    ids = torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(4))
    return TokenRows(ids, (length,) * (count - 1) + (length // 2,))


def projections(checkpoint: Checkpoint) -> list[str]:
    return [name for name in checkpoint.tensors.names() if name.endswith("_proj.weight")]


def values(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.tensors.rows(name, 0, checkpoint.tensors.shape(name)[0]).float()


def hidden_states(checkpoint: Checkpoint, changed: dict[str, Tensor], rows: TokenRows) -> Tensor:
    """The last hidden states after the text, with some weights changed."""
    reference: nn.Module = load_reference(checkpoint.config, checkpoint.tensors)
    reference.load_state_dict(changed, strict=False)
    with torch.inference_mode():
        states = reference.base_model(input_ids=rows.ids, use_cache=False)[0]
    return torch.cat([row[:length] for row, length in zip(states, rows.lengths, strict=True)])


def test_the_quantized_model_is_nearer_than_the_rounded_one(model: Checkpoint, tmp_path: Path) -> None:
    rows, store = text_rows(24, 48), BlockStore(tmp_path)
    names = projections(model)
    BlockCalibration(rows, dict.fromkeys(names, INT4), store).run(model.config, model.tensors)
    calibrated, rounded = {}, {}
    for name in names:
        found = store.take(name)
        assert found is not None
        columns = model.tensors.shape(name)[1]
        calibrated[name] = dequantize(found, INT4, columns)
        rounded[name] = dequantize(quantize_rows(values(model, name), INT4), INT4, columns)
    exact = hidden_states(model, {}, rows)
    errors = [(hidden_states(model, changed, rows) - exact).square().mean() for changed in (calibrated, rounded)]
    assert errors[0] < 0.65 * errors[1]
    assert not list(tmp_path.iterdir())  # what was taken is gone


def test_memory_is_a_modules_weights_and_not_the_models(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Bytes of all live tensors when the last matrix is done, for a model of 8 layers and one of 2."""
    most = []
    for layers in (2, 8):
        sizes = {"num_hidden_layers": layers, "hidden_size": 128, "intermediate_size": 512}
        folder = random_folder(Family(f"deep{layers}", "llama", sizes), tiny_checkpoint, tmp_path / f"model{layers}")
        checkpoint, last = open_checkpoint(str(folder)), f"model.layers.{layers - 1}.mlp.down_proj.weight"
        seen: list[int] = []

        class Watched(BlockStore):
            def put(self, name: str, rows: QuantizedRows, expert: int = 0) -> None:
                if name == last:  # noqa: B023
                    alive = (thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter))
                    seen.append(sum(tensor.nbytes for tensor in alive if not tensor.is_meta))  # noqa: B023
                super().put(name, rows, expert)

        (tmp_path / f"store{layers}").mkdir()
        wanted = dict.fromkeys(projections(checkpoint), INT4)
        BlockCalibration(text_rows(4, 32), wanted, Watched(tmp_path / f"store{layers}")).run(
            checkpoint.config, checkpoint.tensors
        )
        most += seen
    assert len(most) == 2
    assert most[1] < most[0] + 2**20  # six more layers are 4.7 MiB of weights


def test_experts_are_quantized_on_their_own_tokens_and_rounded_where_those_are_few(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    family = Family("experts", "mixtral", {"num_local_experts": 4})
    checkpoint = open_checkpoint(str(random_folder(family, tiny_checkpoint, tmp_path / "model")))
    name = next(name for name in checkpoint.tensors.names() if name.endswith("experts.gate_up_proj"))
    layer = name.removesuffix("gate_up_proj")
    wanted = {f"{layer}{part}": INT4 for part in ("gate_up_proj", "down_proj")}
    for count, whole in ((20, True), (2, False)):
        rows = text_rows(count, 64)
        (tmp_path / str(count)).mkdir()
        store = BlockStore(tmp_path / str(count))
        run = BlockCalibration(rows, wanted, store)
        run.run(checkpoint.config, checkpoint.tensors)
        kept = [store.take(f"{layer}down_proj", expert) is not None for expert in range(4)]
        assert sum(kept) == 4 - run.rounded_experts
        assert all(kept) == whole
    assert LEAST_EXPERT_TOKENS > 2 * 64 * 2 / 4  # each of 128 tokens goes to two experts of four


def test_a_bundle_says_what_it_was_calibrated_on(model: Checkpoint, tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("The ferry was late again, and nobody on the quay seemed to mind. " * 30)
    options = ExportOptions(quantization=INT4, calibration=Calibration(mine, 300), check=False)
    manifest = export_bundle(model, tmp_path / "b", options)
    told = manifest["quantization"]["calibration"]
    assert re.fullmatch("[0-9a-f]{64}", told.pop("sha256"))
    assert told == {"text": "mine.txt", "tokens": 300, "rows": 3, "damping": 0.1}
    there = {file.relative_to(tmp_path / "b").as_posix() for file in (tmp_path / "b").rglob("*") if file.is_file()}
    assert there == {*manifest["files"], "bundle.json"}


def test_lm_head_and_the_embedding_have_8_bits(model: Checkpoint, tmp_path: Path) -> None:
    import onnx

    export_bundle(model, tmp_path / "b", ExportOptions(quantization=INT4, calibration=Calibration(NONE), check=False))
    graph = onnx.load(tmp_path / "b" / "model.onnx", load_external_data=False).graph
    products = [node for node in graph.node if node.op_type in ("MatMulNBits", "GatherBlockQuantized")]
    bits = {n.input[n.op_type == "MatMulNBits"]: a.i for n in products for a in n.attribute if a.name == "bits"}
    eight = {name for name, count in bits.items() if count == 8}
    assert eight == {"lm_head.weight_q8", "model.embed_tokens.weight_q8_rows"}
    assert set(bits.values()) == {4, 8}
    assert all(t.data_type == onnx.TensorProto.FLOAT16 for t in graph.initializer if t.name.endswith("_scales"))


@pytest.mark.parametrize("random", [True, False])
def test_random_weights_are_rounded_unless_a_text_is_given(
    random: bool, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    text = None if random else CALIBRATION
    options = ExportOptions(quantization=INT4, calibration=Calibration(text, 256), check=False)
    manifest = export_bundle(tiny_checkpoint, tmp_path / "b", options)
    assert (manifest["quantization"]["calibration"] is None) == random


@pytest.mark.slow
def test_the_real_model_is_much_nearer_than_by_rounding(demo_checkpoint: Checkpoint, tmp_path: Path) -> None:
    parity = {}
    for name, calibration in (("gptq", Calibration()), ("rounded", Calibration(NONE))):
        options = ExportOptions(quantization=INT4, calibration=calibration)
        parity[name] = export_bundle(demo_checkpoint, tmp_path / name, options)["parity"]
    assert parity["gptq"]["mean_kl"] < 0.7 * parity["rounded"]["mean_kl"]
    assert parity["gptq"]["perplexity"] < parity["rounded"]["perplexity"]


def sentences(text: str) -> set[str]:
    return {part.strip() for part in re.split(r"[.\n?!;:]", text) if len(part.strip()) > 20}


def contents(path: Path) -> str:
    """All that the documents of a file say."""
    messages = [
        m for document in read_texts(path) for m in document.get("messages", [{"content": document.get("text")}])
    ]
    return "\n".join(message["content"] for message in messages)


def test_no_sentence_of_the_calibration_is_in_what_judges() -> None:
    judged = sentences(built_in_text() + "\n" + contents(HELD_OUT))
    seen = sentences(contents(CALIBRATION))
    assert len(judged) > 60
    assert len(seen) > 100
    assert not judged & seen


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quant", "int4", "--calibration", "missing.txt"), "no such file"),
        (("--quant", "int8", "--calibration", "none"), "is for --quant int4 of dialect ort, w8a8 and fp8"),
        (("--quant", "int4", "--calibration", "none", "--calibration-tokens", "512"), "--calibration none leaves out"),
        (("--quant", "w8a8", "--dialect", "tensorrt", "--calibration", "none"), "give --calibration a text"),
    ],
)
def test_calibrations_that_cannot_be_are_refused_in_a_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refusal("export", "random:starling-tiny", tmp_path / "b", *arguments)
    assert not (tmp_path / "b").exists()


def test_a_text_that_is_too_short_is_refused_and_leaves_nothing(model: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    options = ExportOptions(quantization=INT4, calibration=Calibration(tmp_path / "short.txt"), check=False)
    with pytest.raises(UserError, match="calibration wants at least 256"):
        export_bundle(model, tmp_path / "b", options)
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]


def test_settings_for_8_bits_in_an_int4_bundle_are_those_of_int8() -> None:
    assert INT4.at(8) == replace(INT4, scheme="int8")
    assert INT4.at(8).is_symmetric
    assert INT4.at(4) is INT4
