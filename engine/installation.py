"""How Starling came onto this machine, so that a message can give the command that adds an extra to it."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

DISTRIBUTION = "starling-llm"
#: In a checkout its top-level folder: the packages are links into it.
_ROOT = Path(__file__).resolve().parents[1]


def install_command(extra: str | None = None, *options: str) -> str:
    """`pip install …` for the same Starling with this extra: from the checkout, file or address that it came from.

    pip records these (PEP 610). What came from a package index is named `starling-llm[extra]`.
    """
    named = "" if extra is None else f"[{extra}]"
    checkout, editable = _checkout()
    if checkout is not None:
        return " ".join(
            ["pip install", *options, *(["--editable"] if editable else []), shlex.quote(f"{checkout}{named}")]
        )
    return " ".join(["pip install", *options, shlex.quote(f"{DISTRIBUTION}{named}{_address()}")])


def extra_packages(extra: str) -> tuple[str, ...]:
    """The distributions of one extra, for example `export`."""
    marker = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    listed = [text for text in _requirements() if marker.search(text)]
    return tuple(re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in listed)


def _requirements() -> list[str]:
    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # a checkout that is run where it lies
        extras = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        return [f'{text}; extra == "{extra}"' for extra, texts in extras.items() for text in texts]


def _checkout() -> tuple[Path | None, bool]:
    """The checkout that was installed, if one was, and whether in editable mode; also one that was not installed."""
    if (_ROOT / "pyproject.toml").is_file():
        return _ROOT, True
    origin = _origin()
    if "dir_info" not in origin:
        return None, False
    return Path(unquote(urlsplit(origin["url"]).path)), bool(origin["dir_info"].get("editable"))


def _address() -> str:
    """` @ ADDRESS` of the file or repository that was installed; nothing for an install from an index."""
    origin = _origin()
    if not origin:
        return ""
    version_control = origin.get("vcs_info")
    if version_control is None:
        return f" @ {origin['url']}"
    return f" @ {version_control['vcs']}+{origin['url']}@{version_control['commit_id']}"


def _origin() -> dict[str, Any]:
    """What pip's direct_url.json says; empty for an install from an index."""
    try:
        text = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return {}
    return json.loads(text) if text else {}
