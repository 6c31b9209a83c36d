"""The tokenizer files of a Hugging Face folder, checked against the vocabulary of the model."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from starling.engine.errors import CheckpointError, UnsupportedModelError, one_line
from starling.engine.names import EXTRA_TEMPLATES
from starling.engine.text.chat_template import MOST_BYTES
from starling.engine.untrusted_files import is_file_name
from starling.export.checkpoints.checkpoint import FILES, TokenizerFiles
from starling.export.tokenizers.added_tokens import merge_added_tokens
from starling.export.tokenizers.sentencepiece_model import (
    compare_with_sentencepiece,
    is_bpe,
    sentencepiece_document,
)
from starling.export.tokenizers.starling_tokenizer import openchat_extra_templates
from starling.export.tokenizers.tekken import tekken_document

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")
#: Each becomes a file of the bundle.
MOST_TEMPLATES = 64
OPENCHAT_MARK = "GPT4 Correct"
SPECIAL_TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))


def read_tokenizer_files(folder: Path, config: Any, generation: dict[str, Any]) -> TokenizerFiles:
    """Read the tokenizer of `folder`; `config` is the model's PreTrainedConfig, `generation` its generation_config.

    tokenizer.json is taken as it is, not by way of transformers; where there is only tokenizer.model it is converted.
    Added tokens after the vocabulary are dropped, with a note.
    Raises CheckpointError where there is no tokenizer, a file is no JSON, or a base token is outside the vocabulary.
    """
    tokenizer_config = _read_tokens(folder / "tokenizer_config.json")
    template, extra = templates_of(_named_templates(folder, tokenizer_config))
    where = str(folder / "tokenizer.json")
    document, notes = _tokenizer_document(folder, tokenizer_config)
    checked = check_document(document, where=where)
    notes += merge_added_tokens(document, tokenizer_config, folder)
    notes += drop_outside(document, config.vocab_size, where=where)
    ids = token_ids(document)
    special, without_id = _special_tokens(folder, tokenizer_config, ids)
    notes += [f"dropped {name} {text}: it has no id in the vocabulary" for name, text in without_id.items()]
    tokenizer_json = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    if tokenizer_json != checked:
        check_loads(tokenizer_json, where=where)
    bos, pad = (_one_id(key, generation, config, tokenizer_config, ids) for key in ("bos", "pad"))
    return TokenizerFiles(
        tokenizer_json=tokenizer_json,
        tokenizer_config=_clean_config(tokenizer_config, without_id, config.vocab_size),
        special_tokens_map=special,
        chat_template=template,
        additional_chat_templates=extra,
        bos=bos,
        eos=_eos_ids(generation, config, tokenizer_config, ids, template, where=folder),
        pad=pad,
        notes=tuple(notes),
    )


def read_json(path: Path, *, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """One JSON object from a file; `missing` is what an absent file counts as.

    Raises CheckpointError where the file is absent and must not be, or holds no JSON object.
    """
    try:
        return FILES.json(path)
    except FileNotFoundError as error:
        if missing is not None:
            return missing
        raise CheckpointError(f"{path} is missing: give the folder of a whole checkpoint") from error


def _read_tokens(path: Path) -> dict[str, Any]:
    """tokenizer_config.json or special_tokens_map.json, {} where there is none.

    Raises CheckpointError where a special token is no text, or an added token has no number.
    """
    values = read_json(path, missing={})
    for name in SPECIAL_TOKENS:
        if values.get(name) is not None and _text(values[name]) is None:
            raise CheckpointError(f"{path}: {name} is {str(values[name])[:60]!r}, not a token: get the file again")
    several = values.get("additional_special_tokens") or []
    if not isinstance(several, list) or any(_text(token) is None for token in several):
        raise CheckpointError(f"{path}: additional_special_tokens is no list of tokens: get the file again")
    decoder = values.get("added_tokens_decoder")
    if isinstance(decoder, dict) and not all(key.isdecimal() for key in decoder):
        raise CheckpointError(f"{path}: added_tokens_decoder has a key that is no token id: get the file again")
    return values


def token_ids(document: dict[str, Any]) -> dict[str, int]:
    """Token -> id of a tokenizer.json, added tokens included."""
    vocab = document["model"]["vocab"]
    base = vocab if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}
    return {**base, **{token["content"]: token["id"] for token in document.get("added_tokens") or ()}}


def drop_outside(document: dict[str, Any], vocab_size: int, *, where: str) -> list[str]:
    """Take added tokens with an id >= vocab_size out of a tokenizer.json, in place; one note for each.

    The embedding has no row for such an id, and a GPU reads past its end. Raises CheckpointError for a base token.
    """
    vocab = document["model"]["vocab"]
    added = document.get("added_tokens") or []
    outside = [token for token in added if token["id"] >= vocab_size]
    base = vocab.items() if isinstance(vocab, dict) else ((entry[0], i) for i, entry in enumerate(vocab))
    dropped = {token["content"] for token in outside}
    worst = max(((i, text) for text, i in base if i >= vocab_size and text not in dropped), default=None)
    template = (document.get("post_processor") or {}).get("special_tokens") or {}
    put_in = [text for text, token in template.items() if max(token["ids"], default=0) >= vocab_size]
    if worst is not None:
        raise CheckpointError(
            f"{where}: token {worst[1]!r} has id {worst[0]}, outside the vocabulary of {vocab_size}: "
            "config.json and tokenizer.json are not of the same model"
        )
    if put_in:
        raise CheckpointError(
            f"{where}: its post_processor adds {put_in[0]!r}, outside the vocabulary of {vocab_size}: "
            "take it out of the post_processor"
        )
    document["added_tokens"] = [token for token in added if token["id"] < vocab_size]
    if isinstance(vocab, dict):
        document["model"]["vocab"] = {text: i for text, i in vocab.items() if i < vocab_size}
    return [f"dropped {t['content']} (id {t['id']}): outside the vocabulary of {vocab_size}" for t in outside]


def check_document(document: dict[str, Any], *, where: str) -> str:
    """Check that `document` is a tokenizer.json that the tokenizers library loads; the text that was loaded.

    Raises CheckpointError naming the file `where` if it is not.
    """
    try:
        token_ids(document)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{where} is no tokenizer of the tokenizers library ({error!r}): get it again") from error
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    check_loads(text, where=where)
    return text


def check_loads(tokenizer_json: str, *, where: str) -> None:
    """Load a tokenizer.json once, as the engine will. Raises CheckpointError naming the file `where` if that fails."""
    try:
        Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{where}: the tokenizer cannot be loaded ({error}): get the file again") from error


def templates_of(named: dict[str, str]) -> tuple[str | None, dict[str, str]]:
    """Split named chat templates into the default one and the others.

    A name becomes a file's in the bundle. Raises CheckpointError for one that cannot, and for a text that is too long.
    A default template of the OpenChat kind gets that family's `code` and `math` templates too, if it lacks them.
    """
    if len(named) > MOST_TEMPLATES:
        raise CheckpointError(f"there are {len(named):,} chat templates, more than {MOST_TEMPLATES}")
    for name, text in named.items():
        if not is_file_name(name):
            raise CheckpointError(f"a chat template is called {name[:80]!r}: use letters, digits and _ . + -")
        if len(text) > MOST_BYTES:
            raise CheckpointError(f"chat template {name!r} has {len(text):,} characters, more than {MOST_BYTES:,}")
    default = named.get("default")
    extra = {name: text for name, text in named.items() if name != "default"}
    if default is not None and OPENCHAT_MARK in default:
        extra = openchat_extra_templates() | extra
    return default, extra


def _named_templates(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, str]:
    # Later sources win, as in transformers: the files before what tokenizer_config.json holds.
    inline = tokenizer_config.get("chat_template") or []
    try:
        named = {"default": inline} if isinstance(inline, str) else {one["name"]: one["template"] for one in inline}
    except (TypeError, KeyError):
        named = {"": None}
    if not all(isinstance(text, str) for pair in named.items() for text in pair):
        path = folder / "tokenizer_config.json"
        raise CheckpointError(f"{path}: chat_template is neither a text nor a list of named ones: get the file again")
    if (folder / "chat_template.jinja").is_file():
        named["default"] = _read_template(folder / "chat_template.jinja")
    for path in sorted((folder / EXTRA_TEMPLATES).glob("*.jinja")):
        named[path.stem] = _read_template(path)
    return named


def _read_template(path: Path) -> str:
    try:
        return FILES.text(path, most=MOST_BYTES)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is a link to nothing: get the file again") from error


def check_has_tokenizer(folder: Path) -> None:
    """Raise CheckpointError where no file of the folder is a tokenizer."""
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(f"{folder} has no tokenizer: it needs one of {', '.join(_TOKENIZERS)}")


def _tokenizer_document(folder: Path, tokenizer_config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content of tokenizer.json, read or made; and notes on how it was made."""
    check_has_tokenizer(folder)
    if (folder / "tokenizer.json").is_file():
        return read_json(folder / "tokenizer.json"), []
    model_file = folder / "tokenizer.model"
    if model_file.is_file() and is_bpe(model_file):
        return sentencepiece_document(model_file, tokenizer_config)
    if (folder / "tekken.json").is_file():
        return tekken_document(folder / "tekken.json"), []
    document = _converted(folder, tokenizer_config)
    return document, compare_with_sentencepiece(model_file, document) if model_file.is_file() else []


def _converted(folder: Path, tokenizer_config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of the folder's tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        document: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # readers of a dozen formats, each with exceptions of its own
        if tokenizer_config.get("auto_map"):
            problem = (
                f"the tokenizer of {folder} is code of its own (auto_map in tokenizer_config.json), which is not run"
            )
            raise UnsupportedModelError(
                f"{problem}: save it as tokenizer.json, by transformers where you trust it"
            ) from error
        problem = f"the tokenizer of {folder} cannot be converted to tokenizer.json: {one_line(error)}"
        raise CheckpointError(problem) from error
    return document


def _text(token: Any) -> str | None:
    # tokenizer_config.json spells a token as a string or as {"content": …}.
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _special_tokens(
    folder: Path, tokenizer_config: dict[str, Any], ids: dict[str, int]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(special_tokens_map.json, or the same keys of tokenizer_config.json; the ones left out as they have no id)."""
    special = _read_tokens(folder / "special_tokens_map.json")
    special = special or {name: tokenizer_config[name] for name in SPECIAL_TOKENS if tokenizer_config.get(name)}
    kept: dict[str, Any] = {}
    without_id: dict[str, str] = {}
    for name, value in special.items():
        if isinstance(value, list):
            kept[name] = [token for token in value if _text(token) in ids]
        elif _text(value) in ids:
            kept[name] = value
        elif value is not None:
            without_id[name] = str(_text(value))
    return kept, without_id


def _clean_config(tokenizer_config: dict[str, Any], without_id: dict[str, str], vocab_size: int) -> dict[str, Any]:
    # A reader of the bundle must not add the dropped tokens again, and finds the templates in their own files.
    clean = {key: value for key, value in tokenizer_config.items() if key not in {"chat_template", *without_id}}
    if isinstance(decoder := clean.get("added_tokens_decoder"), dict):
        clean["added_tokens_decoder"] = {i: token for i, token in decoder.items() if int(i) < vocab_size}
    return clean


def _one_id(
    which: str, generation: dict[str, Any], config: Any, tokenizer_config: dict[str, Any], ids: dict[str, int]
) -> int | None:
    text = _text(tokenizer_config.get(f"{which}_token"))
    if text in ids:
        return ids[text]
    for value in (generation.get(f"{which}_token_id"), getattr(config, f"{which}_token_id", None)):
        if isinstance(value, int) and 0 <= value < config.vocab_size:
            return value
    return None


def _eos_ids(
    generation: dict[str, Any],
    config: Any,
    tokenizer_config: dict[str, Any],
    ids: dict[str, int],
    template: str | None,
    *,
    where: Path,
) -> tuple[int, ...]:
    """Where generation stops: generation_config's ids, else config's; for a chat model also the end of a turn."""
    stated = generation.get("eos_token_id")
    stated = getattr(config, "eos_token_id", None) if stated is None else stated
    found = list(stated) if isinstance(stated, list | tuple) else [] if stated is None else [stated]
    if not all(type(index) is int for index in found):
        file = "config.json" if generation.get("eos_token_id") is None else "generation_config.json"
        raise CheckpointError(f"{where / file}: eos_token_id is {stated!r}, not a token id or a list of them")
    if template is not None:
        end_of_turn = _text(tokenizer_config.get("eos_token"))
        found += [ids[end_of_turn]] if end_of_turn in ids else []
    return tuple(dict.fromkeys(index for index in found if 0 <= index < config.vocab_size))
