"""The special tokens of a GGUF file, and where its answers end: by ids that it states, and by names as llama.cpp does.

Files of chat models often state `<|endoftext|>` as their end while a turn ends by `<|im_end|>`; llama.cpp knows the
latter by its name, and takes any token of such a name for a control token whatever type the file gives it.
"""

from collections.abc import Iterator
from typing import Any

from starling.export.tokenizers.sentencepiece_bpe import PieceKind

# As in llama.cpp's src/llama-vocab.cpp, "special_eog_ids".
END_NAMES = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>"),
        *("<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<eos>", "</s>"),
        *("<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<turn|>", "<|tool_response>"),
    }
)
# Tokens of infilling that a model writes after its part: the key of each, else the first of these names.
_INFILL_ENDS = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# Formats in which a token of END_NAMES is an ordinary mark: it ends nothing where all of the second are there too.
_NO_END = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|return|>", "<|calls|>"}),
    ("<|end|>", {"<|call|>", "<|flush|>"}),
    ("<|end|>", {"<|calls|>", "<|flush|>"}),
    ("</s>", {"<|tool_response>"}),
)
# Marks of the harmony format, which a reader of the answer has to see.
_SHOWN = frozenset({"<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"})

_KEYS = {"bos": "bos", "eos": "eos", "eot": "eot", "eom": "eom", "unk": "unknown", "pad": "padding"}


def stated_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """The ids that the file states, under the names bos, eos, eot, eom, unk and pad."""
    found = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _KEYS.items()}
    return {name: index for name, index in found.items() if index is not None}


def end_ids(metadata: dict[str, Any]) -> tuple[int, ...]:
    """Every id that ends an answer: the stated end tokens first, then those that a name makes one, by their ids."""
    ids = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    stated = stated_ids(metadata)
    by_name = {token: ids[token] for token in END_NAMES if token in ids}
    by_name |= {token: index for token, index in _infill_ends(metadata, ids)}
    named_by_key = {index for name in ("eos", "eot", "eom") if (index := stated.get(name)) is not None}
    for token, others in _NO_END:
        if others <= by_name.keys():
            by_name.pop(token, None)
            named_by_key.discard(ids.get(token, -1))
    first = [stated[name] for name in ("eos", "eot", "eom") if stated.get(name) in named_by_key]
    return tuple(dict.fromkeys([*first, *sorted(by_name.values())]))


def _infill_ends(metadata: dict[str, Any], ids: dict[str, int]) -> Iterator[tuple[str, int]]:
    for key, names in _INFILL_ENDS.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is None:
            index = next((ids[name] for name in names if name in ids), None)
        if index is not None:
            yield metadata["tokenizer.ggml.tokens"][index], index


def token_kinds(metadata: dict[str, Any]) -> list[PieceKind]:
    """The kind of every token. What ends an answer is a control token, hidden in text, whatever the file says.

    Raises ValueError where the file's kinds do not fit its tokens.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    stated = metadata.get("tokenizer.ggml.token_type")
    kinds = [PieceKind.NORMAL] * len(tokens) if stated is None else [PieceKind(kind) for kind in stated]
    if len(kinds) != len(tokens):
        raise ValueError(f"{len(kinds)} types for {len(tokens)} tokens")
    for index in end_ids(metadata):
        kinds[index] = PieceKind.CONTROL
    for index, token in enumerate(tokens):
        if token in _SHOWN:
            kinds[index] = PieceKind.USER_DEFINED
    return kinds
