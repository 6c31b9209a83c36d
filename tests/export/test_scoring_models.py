"""Models that score texts: what a bundle gives is what PyTorch gives, padded or not, whatever dialect and family."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from families import Family
from plain_checkpoints import edit_json
from safetensors.torch import load_file, save_file
from tiny_scorers import (
    classifier_folder,
    classifier_scores,
    padded,
    reward_module,
    save_reward_module,
    texts,
)

from starling.engine.bundle.manifest import Bundle
from starling.engine.engine import Engine
from starling.engine.errors import CheckpointError, StarlingError, UnsupportedModelError, UserError
from starling.export.check.bundle_quality import load_compared
from starling.export.check.reward_module import RewardModule
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.checkpoints.scoring_models import for_task
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization
from starling.export.quantization.qdq_settings import QdqQuantization

pytestmark = pytest.mark.slow

WINDOW = 9
#: One of each shape of attention, norm, rotary embedding and head that a scoring class has in transformers.
FAMILIES = [
    Family("llama", "llama"),
    Family("mistral-window", "mistral", {"sliding_window": WINDOW}),
    Family("qwen2-bias", "qwen2"),
    Family("qwen3-qk-norm", "qwen3"),
    Family("gemma-norms-of-one-plus-weight", "gemma"),
    Family("gemma2-softcap", "gemma2", {"query_pre_attn_scalar": 32, "sliding_window": WINDOW}),
    Family("gemma3-two-kinds-of-layers", "gemma3_text", {"num_key_value_heads": 1, "sliding_window": WINDOW}),
    Family("phi3-fused", "phi3", {"sliding_window": None}),
    Family("phi-partial-rotary-head-bias", "phi", {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    Family("smollm3", "smollm3", {"no_rope_layers": [1, 0, 1]}),
    Family("gpt2-learned-positions", "gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    Family("gpt-neox", "gpt_neox", {"num_key_value_heads": 4}),
    Family("mixtral-experts", "mixtral", {"num_local_experts": 4}),
]


@pytest.fixture(scope="module")
def classifier(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Llama that classifies, pad 7, and its bundle."""
    folder = tmp_path_factory.mktemp("classifier")
    classifier_folder(Family("llama", "llama"), tiny_checkpoint, folder / "model", pad_token_id=7)
    export_bundle(open_checkpoint(str(folder / "model")), folder / "bundle", ExportOptions(check=False))
    return folder / "model", folder / "bundle"


@pytest.fixture(scope="module")
def reward(tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModule, Path]:
    """A module with a value head, and its bundle."""
    module, folder = reward_module(), tmp_path_factory.mktemp("reward")
    save_reward_module(module, tiny_checkpoint, folder / "model")
    export_bundle(open_checkpoint(str(folder / "model")), folder / "bundle", ExportOptions(check=False))
    return module, folder / "bundle"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_scores_of_every_family_are_transformers(family: Family, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = classifier_folder(family, tiny_checkpoint, tmp_path / "model")
    export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(check=False))
    rows = texts((40, 1, 17, 90))
    expected = classifier_scores(folder, rows, 0, "right")
    with Engine(tmp_path / "bundle", max_batch=4) as engine:
        found = engine.score_texts(rows)
    assert np.abs(found - expected).max() < 1e-4
    assert expected.std() > 0.05  # the comparison is of something


@pytest.mark.parametrize("dialect", ["canonical", "tensorrt"])
@pytest.mark.parametrize("window", [None, WINDOW], ids=["full", "window"])
def test_scores_in_the_other_dialects_are_transformers(
    dialect: str, window: int | None, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    family = Family("mistral", "mistral", {"sliding_window": window})
    folder = classifier_folder(family, tiny_checkpoint, tmp_path / "model")
    export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(dialect=dialect, check=True))
    rows = texts()
    with Engine(tmp_path / "bundle", max_batch=4) as engine:
        engine.pooler.backend.run_tokens = 48  # long ones in chunks
        found = engine.score_texts(rows)
    assert np.abs(found - classifier_scores(folder, rows, 0, "right")).max() < 1e-4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, classifier: tuple[Path, Path]) -> None:
    """A text scores here as in a padded batch of transformers, and as the ids that somebody has padded already."""
    folder, bundle = classifier
    rows = texts((12, 3, 25))
    expected = classifier_scores(folder, rows, 7, side)
    with Engine(bundle) as engine:
        assert np.abs(engine.score_texts(rows) - expected).max() < 1e-4
        assert np.abs(engine.score_texts(padded(rows, 7).tolist()) - expected).max() < 1e-4


def test_a_text_that_ends_with_the_padding_token_is_read_where_transformers_reads_it(
    classifier: tuple[Path, Path],
) -> None:
    """Where the padding token is the end of turn too, every chat ends with it; one of nothing else has its first."""
    folder, bundle = classifier
    rows = [[5, 6, 7, 8, 7], [5, 6, 7, 7], [7, 7], [7], [5, 7, 9]]
    expected = [classifier_scores(folder, [row], 7, "right")[0] for row in rows]
    with Engine(bundle) as engine:
        assert np.abs(engine.score_texts(rows) - expected).max() < 1e-4


@pytest.mark.parametrize("trunk", ["transformer.", "model.model.", "model."])
def test_a_trunk_with_a_value_head_scores_as_its_module(
    trunk: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    module = reward_module()
    folder = save_reward_module(module, tiny_checkpoint, tmp_path / "model", trunk)
    checkpoint = open_checkpoint(str(folder))
    assert [name.removeprefix("model.") for name in checkpoint.left_out] == ["lm_head.weight"]
    assert any("left out: 1 tensors that no score depends on, such as" in note for note in checkpoint.notes)
    manifest = export_bundle(checkpoint, tmp_path / "bundle", ExportOptions())
    assert manifest["parity"]["max_abs_diff"] < 1e-4
    rows = texts()
    with torch.inference_mode():
        expected = module(padded(rows, 0)).numpy()
    with Engine(tmp_path / "bundle", max_batch=8) as engine:
        assert np.abs(engine.score_texts(rows) - expected).max() < 1e-4
    assert expected.std() > 0.5


def test_a_value_head_is_read_before_the_first_padding(reward: tuple[RewardModule, Path]) -> None:
    """Also where a text holds that token in its middle; where it begins with it, the last token is read."""
    module, bundle = reward
    rows = [[5, 6, 0, 8, 9], [5, 6, 7, 0, 0], [0, 5, 6], [5]]
    with torch.inference_mode():
        expected = np.stack([module(torch.tensor([row]))[0].numpy() for row in rows])
    with Engine(bundle) as engine:
        assert np.abs(engine.score_texts(rows) - expected).max() < 1e-4


def test_a_long_text_loses_its_beginning_after_bos(reward: tuple[RewardModule, Path]) -> None:
    """As `truncation=True, truncation_side="left"` of transformers' tokenizer: BOS stays, the end too."""
    module, bundle = reward
    with Engine(bundle) as engine:
        text = "The reward is read at the end of an answer. " * 40
        ids = engine.tokenizer.encode(text)
        assert len(ids) > 128
        kept = [1, *ids[-127:]]
        with torch.inference_mode():
            expected = module(torch.tensor([kept]))[0].numpy()
        assert np.abs(engine.score_texts([text])[0] - expected).max() < 1e-4
        assert np.abs(engine.score_texts([ids])[0] - expected).max() < 1e-4
        assert engine.pooler.prepare(text, truncate=10).ids == (1, *ids[-9:])
        assert engine.pooler.prepare(text, truncate=10, side="right").ids == tuple(ids[:10])


def test_the_other_trunk_of_a_module_is_left_out_with_a_note(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A module's state has the trunk twice; PyTorch loads `transformer` last."""
    module = reward_module()
    folder = save_reward_module(module, tiny_checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    again = {
        name.replace("transformer.", "model.model."): t + 1 for name, t in tensors.items() if "transformer." in name
    }
    save_file(tensors | again, folder / "model.safetensors")
    checkpoint = open_checkpoint(str(folder))
    assert len(checkpoint.left_out) == len(again) + 1
    assert export_bundle(checkpoint, tmp_path / "bundle", ExportOptions())["parity"]["max_abs_diff"] < 1e-4


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_scores_are_near_pytorch_and_the_head_stays_whole(
    scheme: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = save_reward_module(reward_module(), tiny_checkpoint, tmp_path / "model")
    options = ExportOptions(quantization=BlockQuantization(scheme))
    parity = export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", options)["parity"]
    assert parity["mean_abs_diff"] < {"int8": 0.06, "int4": 0.6}[scheme] * parity["reference_std"]
    assert parity["mean_abs_diff"] > 1e-4  # it is quantized
    import onnx

    graph = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False).graph
    head = next(node for node in graph.node if "scores" in node.output)
    assert head.op_type == "MatMul"
    weight = next(tensor for tensor in graph.initializer if tensor.name in head.input)
    assert weight.data_type == onnx.TensorProto.FLOAT


def test_scores_in_half_precision_come_from_a_whole_head(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = save_reward_module(reward_module(), tiny_checkpoint, tmp_path / "model")
    manifest = export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(dtype="fp16"))
    assert manifest["graph"]["outputs"][0] == {"name": "scores", "dtype": "float32", "shape": ["batch", "kept", 1]}
    assert manifest["parity"]["max_abs_diff"] < 0.02 * manifest["parity"]["reference_std"]


def test_tensorrt_weights_in_int8_score_near_pytorch(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = classifier_folder(Family("llama", "llama"), tiny_checkpoint, tmp_path / "model")
    options = ExportOptions(dialect="tensorrt", quantization=QdqQuantization("int8"))
    parity = export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", options)["parity"]
    assert parity["mean_abs_diff"] < 0.06 * parity["reference_std"]


@pytest.mark.parametrize(
    ("how", "named"), [(QdqQuantization("w8a8"), "w8a8"), (QdqQuantization("int8", head=True), "quantize-head")]
)
def test_what_is_judged_by_next_tokens_is_refused(
    how: QdqQuantization, named: str, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    folder = classifier_folder(Family("llama", "llama"), tiny_checkpoint, tmp_path / "model")
    with pytest.raises(UserError, match=f"{named} is for models that generate text"):
        export_bundle(
            open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(dialect="tensorrt", quantization=how)
        )


def test_labels_and_what_they_mean_are_in_the_bundle(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    labels = {0: "bad", 1: "so so", 2: "good"}
    folder = classifier_folder(
        Family("llama", "llama"), tiny_checkpoint, tmp_path / "model", id2label=labels,
        problem_type="multi_label_classification",
    )  # fmt: skip
    export_bundle(open_checkpoint(str(folder)), tmp_path / "bundle", ExportOptions(check=False))
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.task == "score"
    assert bundle.raw["format_version"] == 2  # an older Starling refuses it, and says to upgrade
    assert bundle.pooling is not None
    assert bundle.pooling.labels == ("bad", "so so", "good")
    assert bundle.pooling.problem_type == "multi_label_classification"
    assert (bundle.pooling.read_at, bundle.pooling.pad) == ("last_but_pad", 0)


def test_a_fault_of_the_reader_shows_in_the_check(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The head's weight is compared too, with what PyTorch loads by itself."""
    checkpoint = open_checkpoint(str(save_reward_module(reward_module(), tiny_checkpoint, tmp_path / "model")))

    class Wrong:
        names, shape = checkpoint.tensors.names, checkpoint.tensors.shape

        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            rows = checkpoint.tensors.rows(name, start, stop)
            return rows * 1.01 if name == "score.weight" else rows

    with pytest.raises(StarlingError, match=r"score\.weight is not what transformers loads"):
        load_compared(replace(checkpoint, tensors=Wrong()))


def test_a_head_that_is_missing_is_named(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = classifier_folder(Family("llama", "llama"), tiny_checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("score.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has no tensor score\.weight"):
        open_checkpoint(str(folder))


def test_a_class_without_a_plain_head_is_refused_by_name(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = classifier_folder(Family("bert", "bert", {"is_decoder": True}), tiny_checkpoint, tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification: its head is no `score`"):
        open_checkpoint(str(folder))


def test_a_trunk_without_a_scoring_class_is_refused_by_name(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = save_reward_module(reward_module(), tiny_checkpoint, tmp_path / "model")
    edit_json(folder / "config.json", model_type="cohere", architectures=["CohereForCausalLM"])
    with pytest.raises(UnsupportedModelError, match=r"has a v_head\.weight, but transformers has no \*ForSeq"):
        open_checkpoint(str(folder))


def test_a_language_model_embeds_by_its_last_hidden_state(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    checkpoint = for_task(tiny_checkpoint, "embed")
    parity = export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(check=True))["parity"]
    assert parity["max_abs_diff"] < 1e-4
    assert parity["min_cosine"] > 0.99999
    bundle = Bundle.open(tmp_path / "bundle")
    assert bundle.task == "embed"
    with Engine(bundle) as engine:
        assert engine.embed_texts(["a", "b"]).shape == (2, 256)
    options = ExportOptions(quantization=BlockQuantization("int8"), check=True)
    assert export_bundle(checkpoint, tmp_path / "int8", options)["parity"]["min_cosine"] > 0.99


def test_a_bundle_of_another_task_than_the_models_is_refused(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="starling-tiny generates text: a bundle that scores texts cannot be made"):
        for_task(tiny_checkpoint, "score")
