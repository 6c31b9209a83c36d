"""The command line as it is typed, on the 7B shape: `starling profile` and `starling generate`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from starling.profiling.gpu.stages.kit import Kit

_TIMEOUT_S = 100
_PROFILE = ("--prompt-tokens", "128", "--new-tokens", "64", "--repeats", "3", "--no-cold-start")
_DRY_PROFILE = ("--prompt-tokens", "16", "--new-tokens", "4", "--repeats", "1", "--warmup", "0", "--no-cold-start")
_GENERATE = ("hello there", "--max-tokens", "64", "--ignore-eos")
_KEPT_OUT, _KEPT_ERR = 3500, 800
_DOCUMENT = "profile.json"


def run(kit: Kit) -> None:
    """Both bundles with what is on by default."""
    for precision in ("fp16", "int8-fp16"):
        folder = kit.work / kit.large(precision)
        for what, arguments in _commands(kit, folder).items():
            with kit.results.guarded(what=what, bundle=folder.name):
                _run(kit, what, folder, arguments)


def _commands(kit: Kit, folder: Path) -> dict[str, list[str]]:
    """The words after `starling`."""
    document = kit.work / _DOCUMENT
    document.unlink(missing_ok=True)
    settings = _PROFILE if kit.machine.is_card else _DRY_PROFILE
    backend = () if kit.machine.is_card else ("--backend", "onnxruntime-cpu", "--threads", "1")
    return {
        "profile": ["profile", str(folder), *settings, *backend, "--output", str(document)],
        "generate": ["generate", str(folder), *_GENERATE, *backend],
    }


def _run(kit: Kit, what: str, folder: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "starling", *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    kit.results.write(
        what=what,
        bundle=folder.name,
        exit_code=done.returncode,
        out=done.stdout[-_KEPT_OUT:],
        err=done.stderr[-_KEPT_ERR:],
        document=_document(kit.work / _DOCUMENT) if what == "profile" else None,
    )


def _document(file: Path) -> dict[str, Any] | None:
    """The JSON document of a profile without its single steps."""
    if not file.is_file():
        return None
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    for measurement in document.get("measurements", ()):
        for name in [name for name in measurement if name.endswith(("runs", "_by_position_ms"))]:
            del measurement[name]
    return document
