"""Text in lines of a width, with every number beside its unit. Imports nothing heavy: the command line uses it too."""

from __future__ import annotations

import re
from textwrap import wrap

#: A space that is no place to fold at, between a number and what it counts.
_TIED = "\N{NO-BREAK SPACE}"
_NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=[^\W\d_])")


def fold(text: str, width: int, *, cut_words: bool = False) -> list[str]:
    """The text's lines, at least one; `cut_words` says whether a word longer than the width is cut or runs over it."""
    lines = wrap(_NUMBER_AND_UNIT.sub(_TIED, text), width, break_long_words=cut_words, break_on_hyphens=False)
    return [line.replace(_TIED, " ") for line in lines] or [""]
