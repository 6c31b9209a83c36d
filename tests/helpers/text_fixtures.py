"""Real tokenizers for the tests of the text side: Starling's and SmolLM2's, and variations of their tokenizer.json."""

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast

from starling.engine.text.tokenizer import Tokenizer
from starling.export.checkpoints.demo_model import demo_gguf
from starling.export.checkpoints.gguf_parts import open_gguf
from starling.export.tokenizers.gguf_tokenizer import gguf_tokenizer_files
from starling.export.tokenizers.starling_tokenizer import starling_tokenizer_json

STARLING, SMOLLM2 = "starling", "smollm2"
MODELS = (STARLING, SMOLLM2)
VOCAB_SIZES = {STARLING: 32002, SMOLLM2: 49152}
ROLES = {
    STARLING: {"bos_token": "<s>", "eos_token": "<|end_of_turn|>", "unk_token": "<unk>", "sep_token": "<sep>"},
    SMOLLM2: {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"},
}

OPENCHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant', 'system'] %}"
    "{{ raise_exception('no role ' + message['role']) }}{% endif %}"
    "{% if message['role'] != 'system' %}{{ 'PREFIX ' + message['role'].title() + ': ' }}{% endif %}"
    "{{ message['content'] + '<|end_of_turn|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'PREFIX Assistant:' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {STARLING: OPENCHAT.replace("PREFIX", "GPT4 Correct"), SMOLLM2: CHATML}

HARMLESS = [
    *("Hello", "  two spaces", "trailing ", " ", "\n", "\n\n\tindented", "a\r\nb", "1234567890", "3.14159", "f()\n  x"),
    *("x<y and y>z", "<|", "|>", "</", "<s", "0x0A <0x0A>", "https://example.org/?q=1&r=2", "\x00", "\u00a0", "\ufeff"),
    *("naïve café", "e\u0301", "日本語のテキスト", "זה", "\U0001d518\U0001d52b", "😀👩‍👩‍👧‍👦", "…", "�"),
    *("\ue000", "\U0010fffd", "\u2581lower block"),
]


@cache
def tokenizer_json(model: str) -> str:
    if model == STARLING:
        return starling_tokenizer_json()
    metadata = open_gguf(demo_gguf()).metadata
    return gguf_tokenizer_files(metadata, VOCAB_SIZES[SMOLLM2], where="the demo model").tokenizer_json


def bundle_folder(target: Path, document: str, roles: dict[str, Any] | None = None) -> Path:
    """A folder with just the tokenizer's files."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.json").write_text(document, encoding="utf-8")
    (target / "tokenizer_config.json").write_text(json.dumps(roles or {}), encoding="utf-8")
    return target


def load(document: str, roles: dict[str, Any] | None = None, vocab_size: int = 10**6) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.load(bundle_folder(Path(folder), document, roles), vocab_size)


@cache
def tokenizer(model: str) -> Tokenizer:
    return load(tokenizer_json(model), ROLES[model], VOCAB_SIZES[model])


@cache
def raw(model: str) -> tokenizers.Tokenizer:
    """The same tokenizer straight from the library, to compare with."""
    return tokenizers.Tokenizer.from_str(tokenizer_json(model))


def transformers_tokenizer(document: str, roles: dict[str, str]) -> PreTrainedTokenizerFast:
    known = {role: text for role, text in roles.items() if role != "sep_token"}
    make: Any = PreTrainedTokenizerFast  # untyped
    made: PreTrainedTokenizerFast = make(tokenizer_object=tokenizers.Tokenizer.from_str(document), **known)
    return made


def with_tokens(document: str, tokens: list[dict[str, Any]]) -> str:
    """tokenizer.json with more added tokens, whose ids follow; each names its content and the flags that are set."""
    content = json.loads(document)
    first = 1 + max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [flags | token | {"id": first + i} for i, token in enumerate(tokens)]
    return json.dumps(content)


def without_added_token(document: str, text: str) -> str:
    content = json.loads(document)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != text]
    return json.dumps(content)


def phi3_like() -> str:
    """Starling's vocabulary with Phi-3's turn tokens, which swallow the space after them."""
    names = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|placeholder|>")
    return with_tokens(tokenizer_json(STARLING), [{"content": name, "rstrip": True} for name in names])


def prefix_at_start_only(document: str) -> str:
    """Llama's *non-legacy* behaviour: only the very first text gets a word-start prefix."""
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    return json.dumps(json.loads(document) | {"normalizer": None, "pre_tokenizer": metaspace})


def random_text(rng: random.Random, pieces: list[str] = HARMLESS) -> str:
    return "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(rng.randint(1, 8)))


def random_chat(rng: random.Random, pieces: list[str] = HARMLESS) -> list[dict[str, str]]:
    roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(0, 2) + ["user"]
    return [{"role": role, "content": random_text(rng, pieces)} for role in roles]
