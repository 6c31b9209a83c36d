"""Token ids to text, one id at a time, such that the pieces joined are the text of all ids decoded at once.

`tokenizers.decoders.DecodeStream` does not hold that: it has no flush, keeps everything it could not decode (so that
its cost grows with it), and shows byte-fallback characters which a later invalid byte takes back.
"""

import codecs
import json
from collections.abc import Collection, Mapping, Sequence
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


class DetokenizerFactory:
    """Makes detokenizers that fit one tokenizer's decoder; special tokens give no text.

    The text of every id is looked up once, here: after a step of the model the caches are cold, and a look-up in the
    library's table then costs 50 µs.
    """

    def __init__(self, core: tokenizers.Tokenizer, special_ids: Collection[int], vocab: Mapping[str, int]) -> None:
        """`vocab`: the id of every token, added ones too."""
        self._core, self._special_ids = core, frozenset(special_ids)
        config = json.loads(core.decoder.__getstate__()) if core.decoder is not None else {}
        steps = config.get("decoders", [])
        self._byte_level = config.get("type") == "ByteLevel"
        self._sentencepiece = steps[:3] == SENTENCEPIECE and steps[3:] in ([], [STRIP_FIRST_SPACE])
        self._strips = bool(steps[3:])
        texts = self._texts_by_id(vocab) if self._byte_level or self._sentencepiece else []
        piece = _characters if self._byte_level else _text_or_byte
        self._pieces = [None if text is None else piece(text) for text in texts]
        self._with_shown: dict[frozenset[int], list[str | bytes | None]] = {}

    @property
    def strips_first_space(self) -> bool:
        """Whether the first space of a text that continues no prompt is not shown."""
        return self._sentencepiece and self._strips

    @property
    def is_sentencepiece(self) -> bool:
        """Whether it is a vocabulary with byte fallback, whose tokenizer puts a space before a text."""
        return self._sentencepiece

    def token_bytes(self) -> list[bytes] | None:
        """The bytes of every token by id, b"" for special ids and gaps; None where a token has none of its own."""
        if not self._byte_level and not self._sentencepiece:
            return None
        return [piece.encode() if isinstance(piece, str) else piece or b"" for piece in self._pieces]

    def make(self, prompt_ids: Sequence[int] = (), shown: Mapping[int, str] | None = None) -> Detokenizer:
        """A fresh detokenizer.

        After `prompt_ids` the first space is kept, and a character that the prompt left incomplete is completed.
        `shown` are special ids that give a text.
        """
        pieces = self._pieces_with(shown) if shown else self._pieces
        tail = [token_id for token_id in prompt_ids[-PROMPT_TAIL:] if token_id not in self._special_ids]
        if self._byte_level:
            return _ByteLevel(pieces, tail)
        if self._sentencepiece:
            started = bool(tail) or any(token_id not in self._special_ids for token_id in prompt_ids)
            return _SentencePiece(pieces, tail, strip=self._strips and not started)
        return _Window(self._core, tail)

    def _pieces_with(self, shown: Mapping[int, str]) -> list[str | bytes | None]:
        """The pieces with those of special ids, made once for each set of them: a program has one or two."""
        key = frozenset(shown)
        if key not in self._with_shown:
            pieces = list(self._pieces)
            for token_id, text in shown.items():
                pieces[token_id] = text
            self._with_shown[key] = pieces
        return self._with_shown[key]

    def _texts_by_id(self, vocab: Mapping[str, int]) -> list[str | None]:
        """Texts by id, None for special ids and gaps; those of a byte-level vocabulary with a character per byte."""
        texts: list[str | None] = [None] * (max(vocab.values(), default=-1) + 1)
        for token, token_id in vocab.items():
            texts[token_id] = token
        if self._byte_level:
            written = [token.content for token in self._core.get_added_tokens_decoder().values()]
            texts = _as_bytes(texts, {token: token.encode().decode("latin-1") for token in written})
        for token_id in self._special_ids:
            if token_id < len(texts):
                texts[token_id] = None
        return texts


class _ByteLevel:
    """GPT-2's vocabulary, whose tokens are bytes: UTF-8 decoded incrementally.

    `pieces` has whole characters as str, other bytes as bytes, None for special ids and gaps.
    """

    __slots__ = ("_incomplete", "_pieces", "_utf8")

    def __init__(self, pieces: Sequence[str | bytes | None], tail: Sequence[int]) -> None:
        self._pieces = pieces
        # Python and the library alike put one U+FFFD for each maximal part of a character (Unicode, section 3.9).
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._incomplete = False
        for token_id in tail:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        try:
            piece = self._pieces[token_id]
        except IndexError:
            return ""
        if piece is None:
            return ""
        if isinstance(piece, str):
            if not self._incomplete:
                return piece
            piece = piece.encode()
        text = self._utf8.decode(piece)
        self._incomplete = bool(self._utf8.getstate()[0])
        return text

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _SentencePiece:
    """A vocabulary with byte fallback, as in Llama 2, Mistral and Gemma.

    The library shows a run of byte tokens as its characters if the whole run is UTF-8, else as U+FFFD for each byte.
    So a run is held until it ends. `pieces` has byte tokens as bytes, others as str, None for special ids and gaps.
    """

    __slots__ = ("_pieces", "_run", "_strip")

    def __init__(self, pieces: Sequence[str | bytes | None], tail: Sequence[int], *, strip: bool) -> None:
        self._pieces = pieces
        self._run = bytearray()
        self._strip = False
        for token_id in tail:
            self.push(token_id)
        self._run = bytearray(_incomplete_end(self._run))
        self._strip = strip

    def push(self, token_id: int) -> str:
        try:
            piece = self._pieces[token_id]
        except IndexError:
            return ""
        if piece is None:
            return ""
        if isinstance(piece, str):
            if self._run or self._strip:
                return self.flush() + self._first_space_stripped(piece)
            return piece
        self._run += piece
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


def _as_bytes(texts: list[str | None], written: dict[str, str]) -> list[str | None]:
    """Tokens of GPT-2's alphabet with each byte as the character of that number; those in `written` as given there."""
    alphabet = str.maketrans(char_of_byte())
    return [None if text is None else written.get(text) or text.translate(alphabet) for text in texts]


def _characters(text: str) -> str | bytes:
    """The bytes that the characters of `text` stand for: as text where they are whole characters, else as they are."""
    if text.isascii():
        return text
    encoded = text.encode("latin-1")
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        return encoded


def char_of_byte() -> dict[str, str]:
    """GPT-2's table: printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): chr(byte) for byte in printable} | {chr(256 + i): chr(byte) for i, byte in enumerate(rest)}


def _text_or_byte(token: str) -> str | bytes:
    """The byte of a byte-fallback token such as "<0x0A>", else the token's text."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(WORD_START, " ")


def _incomplete_end(run: bytes | bytearray) -> bytes:
    """The bytes at the end that begin a character."""
    utf8: Any = codecs.getincrementaldecoder("utf-8")("replace")
    utf8.decode(bytes(run))
    return bytes(utf8.getstate()[0])
