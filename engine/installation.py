"""How Starling came onto this machine, so that a message can give the command that adds an extra to it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from starling import __version__

DISTRIBUTION = "starling-llm"
#: In a checkout its top-level folder: the packages are links into it.
_ROOT = Path(__file__).resolve().parents[1]


def install_command(extra: str | None = None, *options: str) -> str:
    """`pip install …` for the same Starling with this extra, from where it came."""
    source, editable = _source()
    named = "" if extra is None else f"[{extra}]"
    if isinstance(source, Path):
        requirement = f"{source}{named}"
    else:
        name, at, address = source.partition(" @ ")
        requirement = f"{name}{named}{at}{address}"
    return " ".join(["pip install", *options, *(["--editable"] if editable else []), shlex.quote(requirement)])


def source() -> str:
    """What pip would install the same Starling from: a checkout or a file, `starling-llm @ ADDRESS`, or a version."""
    found = _source()[0]
    return f"{DISTRIBUTION}=={__version__}" if found == DISTRIBUTION else str(found)


def extra_packages(extra: str) -> tuple[str, ...]:
    """The distributions of one extra, for example `export`."""
    marker = re.compile(rf"extra\s*==\s*['\"]{re.escape(extra)}['\"]")
    listed = [text for text in _requirements() if marker.search(text)]
    return tuple(re.split(r"[^A-Za-z0-9._-]", text, maxsplit=1)[0] for text in listed)


def _requirements() -> list[str]:
    import tomllib
    from importlib import metadata

    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # a checkout that is run where it lies
        extras = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        return [f'{text}; extra == "{extra}"' for extra, texts in extras.items() for text in texts]


def _source() -> tuple[Path | str, bool]:
    """A folder or file, or a requirement without version; and whether the folder is installed in editable mode."""
    if (_ROOT / "pyproject.toml").is_file():
        return _ROOT, True
    from importlib import metadata  # 20 ms that only a message needs

    try:
        recorded = metadata.distribution(DISTRIBUTION).read_text("direct_url.json")  # PEP 610
    except metadata.PackageNotFoundError:
        recorded = None
    if recorded is None:  # from an index
        return DISTRIBUTION, False
    origin: dict[str, Any] = json.loads(recorded)
    url = urlsplit(origin["url"])
    if (versioned := origin.get("vcs_info")) is not None:
        return f"{DISTRIBUTION} @ {versioned['vcs']}+{origin['url']}@{versioned['commit_id']}", False
    if url.scheme == "file":
        return Path(unquote(url.path)), bool(origin.get("dir_info", {}).get("editable"))
    return f"{DISTRIBUTION} @ {origin['url']}", False
