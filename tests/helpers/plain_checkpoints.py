"""A small, whole checkpoint made from scratch, as a folder and as a GGUF file: what hostile ones are made of."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|end|>"
VOCAB = 257
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, and END."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    return tokenizer


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON object in a file, which may not be there yet."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | changes), encoding="utf-8")


def write_folder(folder: Path, **settings: Any) -> Path:
    """A Llama of one layer; `settings` go to its configuration."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(
        **{**shape, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": VOCAB, "max_position_embeddings": 128}
        | settings
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    texts = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))
    return folder


def write_gguf(path: Path, **strings: str) -> Path:
    """The same as a GGUF file; `strings` are further keys, with __ for the dots."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(32)
    writer.add_vocab_size(VOCAB)
    vocab = json.loads(byte_tokenizer().to_str())["model"]["vocab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*sorted(vocab, key=lambda token: int(vocab[token])), END])
    writer.add_token_types([1] * (VOCAB - 1) + [3])
    writer.add_token_merges([])
    writer.add_eos_token_id(VOCAB - 1)
    writer.add_chat_template(TEMPLATE)
    for key, text in strings.items():
        writer.add_string(key.replace("__", "."), text)
    generator = np.random.default_rng(0)
    layer = {"attn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    layer |= {"ffn_norm": (64,), "ffn_gate": (64, 64), "ffn_up": (64, 64), "ffn_down": (64, 64)}
    shapes = {"token_embd": (VOCAB, 64), "output_norm": (64,), "output": (VOCAB, 64)}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(shape).astype(np.float32) / 20)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
