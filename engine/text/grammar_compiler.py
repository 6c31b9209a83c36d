"""Grammars compiled for one bundle's tokenizer, through llguidance, and kept for the requests that come again.

A stranger's grammar takes bounded time and memory: its length, the nesting and size of what is compiled, the states of
the lexer and the work of each token have limits, here or in llguidance.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from starling.engine.errors import SamplingError, StarlingError, one_line
from starling.engine.installation import install_command
from starling.engine.text.grammar import JSON_LAYOUT, MOST_MEMBERS, GrammarSpec
from starling.engine.text.grammar_state import GrammarState
from starling.engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

#: Grammars that are kept compiled, and the characters of all of them together: 1 MiB may take 250 MB compiled.
MOST_KEPT, MOST_KEPT_CHARACTERS = 64, 2**20
#: States of a lexer, 1 to 2 kB each, and symbols of a grammar: a hundred times what schemas in use have.
MOST_LEXER_STATES, MOST_SYMBOLS = 25_000, 200_000
#: What may come next, as rules: an object of MOST_MEMBERS that may be left out has several for each.
MOST_ITEMS = 5 * MOST_MEMBERS

#: A rule or a directive that only Lark's syntax has. (llguidance's own test takes minutes for a text of line ends.)
_LARK = re.compile(r"(?m)^[ \t]*(%llguidance\b|start[ \t]*:(?!:=))")


class Grammars:
    """What one bundle's requests are decoded under. Thread-safe; llguidance loads with the first grammar."""

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int], vocab_size: int) -> None:
        """`end_ids` are the tokens that end an answer, `vocab_size` the number of logits."""
        self._tokenizer, self._end_ids, self._vocab_size = tokenizer, tuple(end_ids), vocab_size
        self._lock = Lock()
        self._kept: OrderedDict[tuple[GrammarSpec, bool], LLMatcher] = OrderedDict()

    def start(
        self, spec: GrammarSpec, *, end_ids: Sequence[int] = (), ends: bool = True, after_space: bool = False
    ) -> GrammarState:
        """The beginning of an answer under this grammar.

        `end_ids` end the answer beside the bundle's own, which end none without `ends`; all of them may come only where
        the grammar is complete. `after_space`: the answer's first space is no part of its text, and so none of the
        grammar's. Raises SamplingError for a grammar that cannot be decoded under, StarlingError without llguidance.
        """
        matcher = self._matcher(spec, after_space).deep_copy()
        return GrammarState(matcher, self._vocab_size, own_ends=self._end_ids, other_ends=end_ids, ends=ends)

    def __len__(self) -> int:
        """Grammars that are kept compiled."""
        return len(self._kept)

    def _matcher(self, spec: GrammarSpec, after_space: bool) -> LLMatcher:
        key = spec, after_space
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            tokenizer = self._ll_tokenizer
        made = _compiled(spec, after_space, tokenizer)
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > MOST_KEPT or sum(len(kept.text) for kept, _ in self._kept) > MOST_KEPT_CHARACTERS:
                self._kept.popitem(last=False)
        return made

    @cached_property
    def _ll_tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance wants it, made once: 0.1 s for 50,000 tokens."""
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            problem = f"grammars need the package llguidance, which is not installed ({error})"
            raise StarlingError(problem, detail=install_command(None, "--upgrade")) from error
        ends = [token for token in self._end_ids if token < self._vocab_size]
        vocabulary: Any = _Vocabulary(self._tokenizer, self._vocab_size, ends)
        return LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=ends or None)


class _Vocabulary:
    """The bytes of every token, as llguidance reads them from an object of these attributes."""

    is_tokenizer_wrapper = True
    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        found = tokenizer.token_bytes()
        self.tokens = [*found, *[b""] * (vocab_size - len(found))]
        self.special_token_ids = sorted({*tokenizer.special_ids, *ends})
        for token in self.special_token_ids:
            self.tokens[token] = (tokenizer.id_to_token(token) or f"<|{token}|>").encode()
        self.eos_token_id = ends[0] if ends else None

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that continues another one, which llguidance takes where the grammar leaves no choice."""
        ids = self._tokenizer.encode_continuation(text)
        # A tokenizer may change what it encodes, as by Unicode's normal forms; the grammar wants these very bytes.
        if b"".join(self.tokens[token] for token in ids) == text.encode():
            return ids
        return self._longest_tokens(text.encode())

    def _longest_tokens(self, text: bytes) -> list[int]:
        ids: list[int] = []
        place = 0
        while place < len(text):
            ends = range(min(len(text), place + self._longest), place, -1)
            end = next((end for end in ends if text[place:end] in self._ids), None)
            if end is None:  # no token for this byte
                break
            ids.append(self._ids[text[place:end]])
            place = end
        return ids

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        special = frozenset(self.special_token_ids)
        return {text: token for token, text in enumerate(self.tokens) if text and token not in special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._ids), default=0)


def _compiled(spec: GrammarSpec, after_space: bool, tokenizer: LLTokenizer) -> LLMatcher:
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, _written(spec, after_space), log_level=0, limits=_limits())
    if not matcher.is_error():
        matcher.compute_bitmask()  # what is too much for the first token is refused here
    if matcher.is_error():
        raise _refusal(spec, one_line(Exception(matcher.get_error())))
    return matcher


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=MOST_LEXER_STATES,
        max_grammar_size=MOST_SYMBOLS,
        max_items_in_row=MOST_ITEMS,
        verbose_errors=False,
    )


def _written(spec: GrammarSpec, after_space: bool) -> str:
    """The grammar in llguidance's own form. Raises SamplingError for one that is neither Lark nor GBNF."""
    grammars: list[dict[str, Any]] = [{"name": "answer", **_body(spec)}]
    if after_space:
        grammars.insert(0, {"lark_grammar": 'start: " " @answer'})
    return json.dumps({"grammars": grammars})


def _body(spec: GrammarSpec) -> dict[str, Any]:
    from llguidance import regex_to_lark
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if spec.kind == "regex":
        # Digits are ASCII's: others would be none to most readers of the answer.
        return {"lark_grammar": f"start: /{regex_to_lark(spec.text, 'd')}/"}
    if spec.kind == "choice":
        quoted = (json.dumps(text, ensure_ascii=False) for text in json.loads(spec.text))
        return {"lark_grammar": "start: " + " | ".join(quoted)}
    if spec.kind == "lark":
        try:
            return {"lark_grammar": spec.text if _LARK.search(spec.text) else gbnf_to_lark(spec.text)}
        except Exception as error:  # its own class of error, or Python's stack
            raise _refusal(spec, one_line(error)) from None
    schema = json.loads(spec.text) if spec.kind == "json_schema" else {"type": "object"}
    return {"json_schema": {"x-guidance": JSON_LAYOUT, **schema}}


def _refusal(spec: GrammarSpec, reason: str) -> SamplingError:
    return SamplingError(f"the {spec.kind} cannot be decoded under", detail=reason, field=spec.field)
