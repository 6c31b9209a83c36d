"""The text of single tokens, for log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from starling.engine.generation.sampler import TokenLogprob
from starling.engine.text.detokenizer import REPLACEMENT
from starling.engine.text.tokenizer import Tokenizer


class TokenTexts:
    """Texts of token ids as they stand inside a text, spaces kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # After another token a text keeps the space that it begins with.
        self._before = tokenizer.encode("a", add_special_tokens=False)
        self.text = lru_cache(maxsize=65536)(self._text)

    def _text(self, token: int) -> str:
        """The text of an id; a special token's own name; U+FFFD for bytes that are no whole character."""
        if token in self._tokenizer.special_ids:
            return self._tokenizer.id_to_token(token) or ""
        detokenizer = self._tokenizer.detokenizer(self._before)
        return detokenizer.push(token) + detokenizer.flush()

    def completion(self, entries: Sequence[tuple[int, TokenLogprob]]) -> dict[str, Any]:
        """OpenAI's `logprobs` of a completion; each entry has the offset of its text in the answer."""
        return {
            "tokens": [self.text(entry.token) for _, entry in entries],
            "token_logprobs": [entry.logprob for _, entry in entries],
            "top_logprobs": [self._alternatives(entry) for _, entry in entries],
            "text_offset": [offset for offset, _ in entries],
        }

    def chat(self, entries: Sequence[tuple[int, TokenLogprob]]) -> dict[str, Any]:
        """OpenAI's `logprobs` of a chat's choice."""
        return {"content": [self._chat_entry(entry) for _, entry in entries], "refusal": None}

    def _alternatives(self, entry: TokenLogprob) -> Mapping[str, float]:
        texts: dict[str, float] = {}
        for token, value in entry.top:
            texts.setdefault(self.text(token), value)  # two tokens may have one text; the likelier one stands
        return texts

    def _chat_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        return self._token(entry.token, entry.logprob) | {
            "top_logprobs": [self._token(token, value) for token, value in entry.top]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text(token)
        # A piece of a character has no text of its own, and its bytes cannot be known from that text.
        return {"token": text, "logprob": logprob, "bytes": None if REPLACEMENT in text else list(text.encode())}
