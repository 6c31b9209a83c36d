"""`peers.json`: what a setup made, and what a comparison reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starling.engine.errors import UserError
from starling.profiling.peers.contenders import Contender

NAME = "peers.json"
FORMAT, FORMAT_VERSION = "starling-peers", 1


def write_peers(folder: Path, contenders: Sequence[Contender]) -> None:
    """List the contenders that are ready. Paths are kept relative to the folder."""
    listed = [
        asdict(contender)
        | {"python": str(contender.python.relative_to(folder)), "model": str(contender.model.relative_to(folder))}
        for contender in contenders
    ]
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "contenders": listed}
    (folder / NAME).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read_peers(folder: Path) -> list[Contender]:
    """The contenders of a folder. Raises UserError where it is none that a setup made."""
    file = folder / NAME
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["format_version"] != FORMAT_VERSION:
            raise UserError(f"{file} is of another format or version; run starling.profiling.peers.install again")
        return [_contender(folder.absolute(), entry) for entry in document["contenders"]]
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}); make it with: "
            f"python -m starling.profiling.peers.install {folder}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is broken ({error!r}); run starling.profiling.peers.install again") from error


def _contender(folder: Path, entry: dict[str, Any]) -> Contender:
    return Contender(**entry | {"python": folder / entry["python"], "model": folder / entry["model"]})
