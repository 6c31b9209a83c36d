"""What a plan is built for: compute capabilities by name, checked against the library, the GPU and the precision."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence

from starling.engine.errors import BuildError, UserError

_QUERY_TIMEOUT_S = 10
_KNOWN_AS = {
    "sm75": "RTX 20, T4",
    "sm80": "A100",
    "sm86": "RTX 30, A10",
    "sm89": "RTX 40, L4, L40S",
    "sm90": "H100, H200",
    "sm120": "RTX 50",
}
#: The first compute capability whose tensor cores multiply this; below it TensorRT refuses or falls back.
_FIRST_WITH = {"bf16": 80, "fp8": 89}


def resolve_targets(title: str, supported: Sequence[str] | None, wanted: Sequence[str]) -> tuple[str, ...]:
    """The targets to build for, in order and each once.

    `title` names the library, `supported` are its targets (None: it builds for the GPU that is present only). Without
    `wanted` it is the GPU that is present. Raises UserError for a target that it cannot build for, BuildError where a
    GPU is needed and none is there.
    """
    names = tuple(dict.fromkeys(name.strip().lower() for name in wanted))
    if supported is None:
        return _present_only(title, names)
    for name in names:
        if name not in supported:
            raise UserError(f"target {name!r}: {title} builds for {', '.join(supported)}{_elsewhere(name)}")
    present = () if names else tuple(filter(None, [present_target()]))
    if not names and (not present or present[0] not in supported):
        seen = f"the GPU here is {present[0]}" if present else "there is no GPU here"
        raise UserError(f"{seen}: say what to build for, --target with one or more of {_described(supported)}")
    return names or present


def check_precision(targets: Sequence[str], dtype: str, scheme: str | None) -> None:
    """Raise UserError where a target cannot compute in the bundle's types."""
    for kind in (dtype, scheme):
        first = _FIRST_WITH.get(kind or "", 0)
        for target in targets:
            if capability(target) < first:
                raise UserError(f"target {target} has no {kind}: the bundle's {kind} takes sm{first} or newer")


def capability(target: str) -> int:
    """The number in a target's name: 89 for "sm89"."""
    return int(target.removeprefix("sm"))


def present_target() -> str | None:
    """The first NVIDIA GPU's compute capability as a target, None where nvidia-smi shows none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        shown = subprocess.run(query, capture_output=True, text=True, timeout=_QUERY_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"(\d+)\.(\d+)", shown)
    return f"sm{found[1]}{found[2]}" if found else None


def _present_only(title: str, names: tuple[str, ...]) -> tuple[str, ...]:
    present = present_target()
    if present is None:
        raise BuildError(
            f"{title} builds for the GPU that is present, and nvidia-smi shows none: build on the machine that will "
            "run the plan, or ahead of time with --runtime tensorrt-rtx"
        )
    if names and names != (present,):
        raise UserError(
            f"{title} builds for the GPU that is present ({present}), not for {', '.join(names)}: leave --target out, "
            "or build ahead of time with --runtime tensorrt-rtx"
        )
    return (present,)


def _elsewhere(name: str) -> str:
    if name in _KNOWN_AS:
        return f"; for {name} ({_KNOWN_AS[name]}) build on such a machine with --runtime tensorrt"
    return ""


def _described(targets: Sequence[str]) -> str:
    return ", ".join(f"{name} ({_KNOWN_AS[name]})" if name in _KNOWN_AS else name for name in targets)
