"""The packages of this project's extras, as its own metadata lists them."""

from __future__ import annotations

import re
from importlib import metadata

DISTRIBUTION = "starling-llm"
#: Extras without which a whole command cannot do its work, and what that is.
WHAT_FOR = {"export": "exporting", "serve": "serving", "ray": "a batch on Ray"}


def extra_packages(extra: str) -> tuple[str, ...]:
    """The distributions of one extra, for example `export`."""
    marker = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    listed = [text for text in metadata.requires(DISTRIBUTION) or () if marker.search(text)]
    return tuple(re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in listed)


def extra_of(module: str) -> str | None:
    """The extra that brings this module, whose import name is the distribution's with underscores; None for none."""
    for extra in WHAT_FOR:
        if module in {name.replace("-", "_") for name in extra_packages(extra)}:
            return extra
    return None
