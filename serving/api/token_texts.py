"""The text of single tokens, for log-probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from starling.engine.generation.sampler import TokenLogprob
from starling.engine.text.detokenizer import REPLACEMENT
from starling.engine.text.tokenizer import Tokenizer

#: What stands for the logarithm of 0, as in OpenAI's answers: JSON has no infinity.
_NEVER = -9999.0


class ShownToken(NamedTuple):
    """A token of a text, and the characters of the text before its own."""

    offset: int
    token: int
    #: None for a text's first token, before which there is nothing.
    entry: TokenLogprob | None


#: By token id: `logprob`, `rank` and `decoded_token`.
RankedTable: TypeAlias = dict[str, dict[str, Any]]


def ranked_table(own: tuple[int, float, str], top: Sequence[tuple[int, float, str]]) -> RankedTable:
    """vLLM's table of one position: its own token first, then the likeliest, best first, each (id, logprob, text).

    The rank of an own token beyond the likeliest is None: it is not known.
    """
    table: RankedTable = {
        str(token): {"logprob": logprob, "rank": rank, "decoded_token": text}
        for rank, (token, logprob, text) in enumerate(top, 1)
    }
    token, logprob, text = own
    alone = {"logprob": logprob, "rank": None, "decoded_token": text}
    return {str(token): table.get(str(token), alone), **table}


def _finite(logprob: float) -> float:
    return max(logprob, _NEVER)


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

    def begin(self, token: int, added: str, before: int) -> int:
        """Characters before a token's own, where the text had `before` of them and the token made it grow by `added`.

        That may begin with what was held back until this token: a character's last byte is not known to be one.
        """
        own = self.text(token)
        return before + len(added) - len(own) if own and added.endswith(own) else before

    def completion(self, entries: Sequence[ShownToken]) -> dict[str, Any]:
        """OpenAI's `logprobs` of a completion. The chosen token is among its alternatives, with the same number."""
        return {
            "tokens": [self.text(each.token) for each in entries],
            "token_logprobs": [None if each.entry is None else _finite(each.entry.logprob) for each in entries],
            "top_logprobs": [None if each.entry is None else self._alternatives(each.entry) for each in entries],
            "text_offset": [each.offset for each in entries],
        }

    def chat(self, entries: Sequence[ShownToken]) -> dict[str, Any]:
        """OpenAI's `logprobs` of a chat's choice."""
        return {"content": [self._chat_entry(each.entry) for each in entries if each.entry], "refusal": None}

    def ranked(self, entries: Sequence[TokenLogprob | None]) -> list[RankedTable | None]:
        """vLLM's `prompt_logprobs`, of entries whose first is None: nothing comes before a prompt's first token."""
        return [None if entry is None else self._ranked(entry) for entry in entries]

    def _ranked(self, entry: TokenLogprob) -> RankedTable:
        top = [(token, _finite(value), self.text(token)) for token, value in entry.top]
        return ranked_table((entry.token, _finite(entry.logprob), self.text(entry.token)), top)

    def _alternatives(self, entry: TokenLogprob) -> Mapping[str, float]:
        texts: dict[str, float] = {}
        for token, value in (*entry.top, (entry.token, entry.logprob)):
            texts.setdefault(self.text(token), _finite(value))  # two tokens may have one text; the likelier one stands
        return texts

    def _chat_entry(self, entry: TokenLogprob) -> dict[str, Any]:
        return self._token(entry.token, entry.logprob) | {
            "top_logprobs": [self._token(token, value) for token, value in entry.top]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.text(token)
        # A piece of a character has no text of its own, and its bytes cannot be known from that text.
        return {
            "token": text,
            "logprob": _finite(logprob),
            "bytes": None if REPLACEMENT in text else list(text.encode()),
        }
