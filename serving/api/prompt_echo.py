"""A prompt as `echo` repeats it before the answer: its text, and where each of its tokens stands in that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starling.engine.text.tokenizer import Tokenizer
from starling.serving.api.token_texts import TokenTexts


@dataclass(frozen=True, slots=True)
class PromptEcho:
    """The prompt's text, and for each of its tokens the characters that come before the token's own."""

    text: str
    offsets: tuple[int, ...]
    ids: tuple[int, ...]


def prompt_echo(tokenizer: Tokenizer, texts: TokenTexts, prompt: str | Sequence[int], ids: Sequence[int]) -> PromptEcho:
    """The echo of a prompt whose token ids are `ids`: a text as it was given, token ids as the text that they make.

    Special tokens of the latter have no text, as in answers.
    """
    if isinstance(prompt, str):
        return PromptEcho(prompt, tuple(tokenizer.offsets(prompt)), tuple(ids))
    detokenizer, offsets, text = tokenizer.detokenizer(), [], ""
    for token in ids:
        added = detokenizer.push(token)
        offsets.append(texts.begin(token, added, len(text)))
        text += added
    # What is held back is the beginning of a character, which the answer may complete.
    return PromptEcho(text, tuple(offsets), tuple(ids))
