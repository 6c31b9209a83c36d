"""Token ids to text, one id at a time, such that the pieces joined are the text of all ids decoded at once.

`tokenizers.decoders.DecodeStream` does not hold that: it has no flush, keeps everything it could not decode (so that
its cost grows with it), and shows byte-fallback characters which a later invalid byte takes back.
"""

import codecs
import json
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any, Protocol

import tokenizers

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
WORD_START = "\N{LOWER ONE EIGHTH BLOCK}"
# The decoder of SentencePiece vocabularies; a Strip of one leading space may follow.
SENTENCEPIECE = [
    {"type": "Replace", "pattern": {"String": WORD_START}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP_FIRST_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
# More ids than any character has bytes, with some special tokens between them.
PROMPT_TAIL = 16


class Detokenizer(Protocol):
    """Turns a stream of token ids into text."""

    def push(self, token_id: int) -> str:
        """The text that is certain now, often "" while a character is incomplete."""

    def flush(self) -> str:
        """What was held back, with U+FFFD for bytes that never became a character. Call it once, at the end."""


def make_detokenizer(
    core: tokenizers.Tokenizer, special_ids: Collection[int], prompt_ids: Sequence[int] = ()
) -> Detokenizer:
    """The detokenizer that fits the tokenizer's decoder; special tokens give no text.

    Behind `prompt_ids` the first space is kept, and a character that the prompt left incomplete is completed.
    """
    tail = [token_id for token_id in prompt_ids[-PROMPT_TAIL:] if token_id not in special_ids]
    started = bool(tail) or any(token_id not in special_ids for token_id in prompt_ids)
    config = json.loads(core.decoder.__getstate__()) if core.decoder is not None else {}
    steps = config.get("decoders", [])
    if config.get("type") == "ByteLevel":
        return _ByteLevel(core, special_ids, tail)
    if steps[:3] == SENTENCEPIECE and steps[3:] in ([], [STRIP_FIRST_SPACE]):
        return _SentencePiece(core, special_ids, tail, strip=bool(steps[3:]) and not started)
    return _Window(core, tail)


class _ByteLevel:
    """GPT-2's vocabulary, whose tokens are bytes: UTF-8 decoded incrementally."""

    def __init__(self, core: tokenizers.Tokenizer, special_ids: Collection[int], tail: Sequence[int]) -> None:
        self._core, self._special_ids = core, special_ids
        # Python and the library alike put one U+FFFD for each maximal part of a character (Unicode, section 3.9).
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in tail:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        token = None if token_id in self._special_ids else self._core.id_to_token(token_id)
        return "" if token is None else self._utf8.decode(_token_bytes(token))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _SentencePiece:
    """A vocabulary with byte fallback, as in Llama 2, Mistral and Gemma.

    The library shows a run of byte tokens as its characters if the whole run is UTF-8, else as U+FFFD for each byte.
    So a run is held until it ends.
    """

    def __init__(
        self, core: tokenizers.Tokenizer, special_ids: Collection[int], tail: Sequence[int], *, strip: bool
    ) -> None:
        self._core, self._special_ids = core, special_ids
        self._run = bytearray()
        self._strip = False
        for token_id in tail:
            self.push(token_id)
        self._run = bytearray(_incomplete_end(self._run))
        self._strip = strip

    def push(self, token_id: int) -> str:
        token = None if token_id in self._special_ids else self._core.id_to_token(token_id)
        if token is None:
            return ""
        byte = _fallback_byte(token)
        if byte is None:
            return self.flush() + self._first_space_stripped(token.replace(WORD_START, " "))
        self._run.append(byte)
        return ""

    def flush(self) -> str:
        if not self._run:
            return ""
        try:
            text = self._run.decode("utf-8")
        except UnicodeDecodeError:
            text = REPLACEMENT * len(self._run)
        self._run.clear()
        return self._first_space_stripped(text)

    def _first_space_stripped(self, text: str) -> str:
        strip, self._strip = self._strip, False
        return text.removeprefix(" ") if strip else text


class _Window:
    """Any other decoder: decodes the last few ids with and without the new one, and gives the difference.

    Exact where the text of a token depends on its neighbours alone, as with WordPiece and Metaspace.
    """

    def __init__(self, core: tokenizers.Tokenizer, tail: Sequence[int]) -> None:
        self._core = core
        self._shown = list(tail)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._new_text()
        return "" if text.endswith(REPLACEMENT) and len(self._held) < PROMPT_TAIL else self._show(text)

    def flush(self) -> str:
        return self._show(self._new_text())

    def _new_text(self) -> str:
        return self._decode(self._shown + self._held)[len(self._decode(self._shown)) :]

    def _show(self, text: str) -> str:
        if text:
            self._shown, self._held = self._held, []
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._core.decode(ids, skip_special_tokens=True)


@cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def _token_bytes(token: str) -> bytes:
    table = _byte_of_char()
    try:
        return bytes([table[char] for char in token])
    except KeyError:  # an added token, written as it is
        return token.encode("utf-8")


def _fallback_byte(token: str) -> int | None:
    if len(token) != 6 or not token.startswith("<0x") or not token.endswith(">"):
        return None
    try:
        return int(token[3:5], 16)
    except ValueError:
        return None


def _incomplete_end(run: bytes | bytearray) -> bytes:
    """The bytes at the end that begin a character."""
    utf8: Any = codecs.getincrementaldecoder("utf-8")("replace")
    utf8.decode(bytes(run))
    return bytes(utf8.getstate()[0])
