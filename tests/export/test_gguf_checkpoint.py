"""A GGUF file gives the tensors that transformers dequantizes, and the token ids that llama.cpp gives."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_models import rows_of, write_gguf
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from starling.engine.errors import CheckpointError, UnsupportedModelError
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.demo_model import demo_gguf
from starling.export.checkpoints.gguf_checkpoint import open_gguf_checkpoint
from starling.export.checkpoints.gguf_parts import open_gguf
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.tokenizers.sentencepiece_model import read_pieces
from starling.export.tokenizers.starling_tokenizer import mistral_model_file

pytestmark = pytest.mark.slow

# Made with llama.cpp itself (build 11549, /tokenize with add_special and parse_special off).
LLAMA_CPP_IDS = Path(__file__).parents[1] / "data" / "smollm2_llama_cpp_ids.json"
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = LlamaConfig(**SHAPE, rms_norm_eps=1e-5)


@pytest.fixture(scope="module")
def demo(demo_checkpoint: Checkpoint) -> Checkpoint:
    return demo_checkpoint


@pytest.fixture(scope="module")
def tokenizer(demo: Checkpoint) -> Tokenizer:
    made = Tokenizer.from_str(demo.tokenizer.tokenizer_json)
    made.encode_special_tokens = True
    return made


def test_the_demo_is_smollm2(demo: Checkpoint) -> None:
    assert (demo.kind, demo.name) == ("gguf", "SmolLM2-135M-Instruct")
    assert (demo.config.model_type, demo.config.num_hidden_layers, demo.config.vocab_size) == ("llama", 30, 49152)
    assert demo.config.rms_norm_eps == 1e-5
    assert demo.config.rope_parameters["rope_theta"] == 100000.0
    assert demo.config.tie_word_embeddings
    assert "lm_head.weight" not in demo.tensors.names()
    assert (demo.tokenizer.bos, demo.tokenizer.pad) == (1, 2)
    # <|im_end|> as the file states; <|endoftext|> and <reponame> by name, as llama_vocab_is_eog says of this file.
    assert demo.tokenizer.eos == (2, 0, 4)
    assert "<|im_start|>" in str(demo.tokenizer.chat_template)


def test_every_tensor_of_the_demo_is_what_transformers_dequantizes(demo: Checkpoint) -> None:
    # The part of from_pretrained(gguf_file=…) that reads the tensors; the whole of it takes twice as long.
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(demo.config)  # type: ignore[no-untyped-call]
    loaded = load_gguf_checkpoint(str(demo_gguf()), return_tensors=True, model_to_load=model)  # type: ignore[no-untyped-call]
    reference = loaded["tensors"]
    assert set(demo.tensors.names()) == set(reference)
    for name in demo.tensors.names():
        assert torch.equal(rows_of(demo, name), reference[name]), name


def test_a_row_range_is_a_cut_of_the_whole(demo: Checkpoint) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    assert torch.equal(demo.tensors.rows(name, 37, 301), rows_of(demo, name)[37:301])
    none = demo.tensors.rows(name, 37, 37)
    assert (none.shape, none.dtype) == ((0, *demo.tensors.shape(name)[1:]), rows_of(demo, name).dtype)


def test_the_digits_of_smollm2_stay_apart(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("        0: no debugging output (default)").ids
    assert ids == [353, 32, 42, 787, 33665, 3124, 365, 6518, 25]


def test_smollm2_tokenizes_as_llama_cpp_does(tokenizer: Tokenizer) -> None:
    cases = json.loads(LLAMA_CPP_IDS.read_text(encoding="utf-8"))
    assert len(cases) >= 50
    for case in cases:
        assert tokenizer.encode(case["text"]).ids == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["text"]


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        (GGMLQuantizationType.F16, torch.float16, 2e-3),
        (GGMLQuantizationType.BF16, torch.bfloat16, 1e-2),
        (GGMLQuantizationType.Q8_0, torch.float32, 2e-2),
    ],
    ids=["f16", "bf16", "q8_0"],
)
def test_stored_precision_is_kept(
    tmp_path: Path, kind: GGMLQuantizationType, dtype: torch.dtype, tolerance: float
) -> None:
    model = write_gguf(tmp_path / "m.gguf", LLAMA, kind=kind)
    checkpoint = open_checkpoint(str(tmp_path / "m.gguf"))
    name = "model.layers.1.self_attn.k_proj.weight"
    rows = rows_of(checkpoint, name)
    assert rows.dtype is dtype is checkpoint.config.dtype
    torch.testing.assert_close(rows.float(), model.state_dict()[name], atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "12345 ab", ["12", "3", "4", "5", "Ġ", "ab"]),
        ("smollm", "12345", ["1", "2", "3", "4", "5"]),
        ("qwen2", "12", ["1", "2"]),
        ("llama-bpe", "4512", ["4", "5", "1", "2"]),
        ("default", "12", ["12"]),
    ],
)
def test_the_named_pre_tokenizer_decides_where_digits_part(
    tmp_path: Path, pre: str, text: str, pieces: list[str]
) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, pre=pre)
    tokenizer = Tokenizer.from_str(open_checkpoint(str(tmp_path / "m.gguf")).tokenizer.tokenizer_json)
    assert tokenizer.encode(text, add_special_tokens=False).tokens == pieces


def test_llama_bpe_adds_bos_and_the_others_do_not(tmp_path: Path) -> None:
    for pre, ids in (("llama-bpe", [1]), ("gpt-2", [])):
        write_gguf(tmp_path / "m.gguf", LLAMA, pre=pre)
        tokenizer = Tokenizer.from_str(open_checkpoint(str(tmp_path / "m.gguf")).tokenizer.tokenizer_json)
        assert tokenizer.encode("").ids == ids


def test_a_sentencepiece_vocabulary_is_encoded_as_sentencepiece_does() -> None:
    from starling.export.tokenizers.gguf_tokenizer import gguf_tokenizer_files

    pieces = read_pieces(mistral_model_file())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.text for piece in pieces],
        "tokenizer.ggml.scores": [piece.score for piece in pieces],
        "tokenizer.ggml.token_type": [int(piece.kind) for piece in pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    tokenizer = Tokenizer.from_str(gguf_tokenizer_files(metadata, 32000, where="m.gguf").tokenizer_json)
    reference = SentencePieceProcessor(model_file=str(mistral_model_file()))
    for text in ("Hello  world", " 日本🎉", "a\n\tb 12345"):
        assert tokenizer.encode(text).ids == [1, *reference.encode(text)]


def test_an_unknown_pre_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA, pre="viking")
    with pytest.raises(UnsupportedModelError, match="pre-tokenizer 'viking'"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModelError, match="GGUF architecture 'rwkv7'"):
        open_checkpoint(str(tmp_path / "m.gguf"))


@pytest.mark.parametrize("keep", [0, 3, 100, 5_000, -1000])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA)
    content = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(content[:keep])
    with pytest.raises(CheckpointError, match=r"m\.gguf is truncated"):
        open_checkpoint(str(tmp_path / "m.gguf"))


def test_arrays_nested_without_end_are_refused(tmp_path: Path) -> None:
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    path = tmp_path / "nested.gguf"
    path.write_bytes(head + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000)
    with pytest.raises(CheckpointError, match="is truncated or no GGUF file"):
        open_checkpoint(str(path))


@pytest.mark.parametrize("key", ["llama.block_count", "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id"])
def test_metadata_of_another_type_is_refused(tmp_path: Path, key: str) -> None:
    write_gguf(tmp_path / "m.gguf", LLAMA)
    found = open_gguf(tmp_path / "m.gguf")
    found.metadata[key] = "many"
    with pytest.raises(CheckpointError, match=r"its metadata cannot be used|does not fit the tokens"):
        open_gguf_checkpoint(found, name="x")


def test_a_file_of_another_kind_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(CheckpointError, match="not b'GGUF'"):
        open_checkpoint(str(tmp_path / "m.gguf"))
    with pytest.raises(CheckpointError, match=r"none\.gguf cannot be read: No such file"):
        open_checkpoint(str(tmp_path / "none.gguf"))
