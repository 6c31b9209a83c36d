"""From a text, a chat or token ids to its scores or its embedding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np

from starling.engine.backends.pooling_backend import PoolingBackend, Vectors
from starling.engine.bundle.manifest import Bundle
from starling.engine.bundle.model_records import Pooling, Side
from starling.engine.errors import PromptError, UserError
from starling.engine.generation.prompts import checked_ids
from starling.engine.pooling.runs import run_all
from starling.engine.pooling.texts import cut, read_part
from starling.engine.text.chat_template import ChatTemplates
from starling.engine.text.tokenizer import Tokenizer

#: A text, its token ids, or the messages of a chat.
TextInput: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class PreparedText:
    """`ids` are run; `tokens` is how many the text has, those after the one that is read and none cut off included."""

    ids: tuple[int, ...]
    tokens: int


class TextPooler:
    """A bundle that scores or embeds, on its backend. `prepare` may be called by any thread, the rest by one."""

    def __init__(
        self, bundle: Bundle, backend: PoolingBackend, tokenizer: Tokenizer, templates: Callable[[], ChatTemplates]
    ) -> None:
        assert bundle.pooling is not None
        self.bundle, self.backend, self.pooling = bundle, backend, bundle.pooling
        self._tokenizer, self._templates = tokenizer, templates

    def prepare(
        self,
        text: TextInput,
        *,
        template: str | None = None,
        truncate: int | None = None,
        side: Side | None = None,
    ) -> PreparedText:
        """The tokens of a text, a chat (by the template, without a prompt for an answer) or ids as they are.

        A longer text than `truncate` tokens (-1: than the model takes; default: the bundle's own `max_length`) loses
        some at `side` (default: the bundle's own). Raises PromptError for what is no text, is empty, holds an id
        outside the vocabulary, or is too long where nothing may be cut off.
        """
        most = self._most(truncate)
        limit = self.backend.max_seq if most is None else None
        ids = self._ids(text, template, limit)
        before, after = self._tokenizer.affixes
        if most is not None:
            ids = cut(ids, most, side or self.pooling.truncation_side, before, after)
        checked = checked_ids(ids, self.bundle, self.backend.max_seq)
        return PreparedText(tuple(read_part(checked, self.pooling)), len(checked))

    def paired(self, first: str, second: str) -> TextInput:
        """A question and its answer as one text: a chat where the bundle has a template, else as the tokenizer's pair.

        Raises PromptError for text that is not UTF-8.
        """
        if self._templates().names:
            return [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        return self._tokenizer.encode_pair(first, second)

    def pool_texts(self, texts: Sequence[TextInput], *, template: str | None, truncate: int | None) -> Vectors:
        """`prepare` each of a list of texts, and `pool` them. Raises PromptError."""
        if isinstance(texts, str) or (len(texts) and not isinstance(texts[0], str | Sequence | np.ndarray)):
            raise PromptError("one text alone is given", detail="give a list of texts")
        return self.pool([self.prepare(text, template=template, truncate=truncate) for text in texts])

    def pool(self, texts: Sequence[PreparedText]) -> Vectors:
        """Scores or hidden states float32 [texts, width], as the model gives them, not normalized."""
        return run_all(self.backend, [text.ids for text in texts], self.pooling)

    def activated(self, vectors: Vectors) -> Vectors:
        """What clients may have in place of raw numbers: probabilities of scores, or vectors of length 1."""
        return activated(vectors, self.pooling) if self.bundle.task == "score" else normalized(vectors)

    def _most(self, truncate: int | None) -> int | None:
        """The most tokens of a text, where the rest is cut off."""
        if truncate is None:
            own = self.pooling.max_length
            return None if own is None else min(own, self.backend.max_seq)
        if truncate != -1 and not 1 <= truncate <= self.backend.max_seq:
            raise UserError(
                f"truncate is {truncate}: give 1 to {self.backend.max_seq} tokens, or -1 for the most", field="truncate"
            )
        return self.backend.max_seq if truncate == -1 else truncate

    def _ids(self, text: TextInput, template: str | None, limit: int | None) -> Sequence[int]:
        if isinstance(text, str):
            if not text:
                raise PromptError("a text is empty", detail="give it at least one character")
            if limit is not None:
                self._tokenizer.check_fits(len(text), limit)
            return self._tokenizer.encode(text)
        if not isinstance(text, Sequence | np.ndarray):
            raise PromptError(f"a text is a {type(text).__name__}", detail="give a string, token ids or messages")
        if len(text) and isinstance(text[0], Mapping):
            messages = cast(Sequence[Mapping[str, Any]], text)
            templates = self._templates()
            options: dict[str, Any] = {} if limit is None else {"limit": limit}
            return templates.encode(messages, self._tokenizer, name=template, add_generation_prompt=False, **options)
        return cast(Sequence[int], text)


def activated(scores: Vectors, pooling: Pooling) -> Vectors:
    """What transformers' pipelines make of raw scores [texts, labels]: probabilities, by the model's `problem_type`.

    "regression" stays as it is; "multi_label_classification", and one label alone, get the logistic function; the rest
    a softmax over the labels.
    """
    if pooling.problem_type == "regression":
        return scores
    wide = scores.astype(np.float64)
    if scores.shape[1] == 1 or pooling.problem_type == "multi_label_classification":
        logistic: Vectors = np.exp(-np.logaddexp(0, -wide)).astype(np.float32)
        return logistic
    powers = np.exp(wide - wide.max(axis=1, keepdims=True))
    shares: Vectors = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def normalized(vectors: Vectors) -> Vectors:
    """Each of the vectors [texts, width] at length 1; one of zeros stays."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
