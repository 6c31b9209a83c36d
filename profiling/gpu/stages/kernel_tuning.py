"""Our CUDA kernels on the card: checked and timed by `tune_kernels`; the best variants in the form the engine reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from starling.engine.kernels.cuda.operators import MEASURED
from starling.profiling.gpu.stages.environment_line import card_target
from starling.profiling.gpu.stages.kit import Kit
from starling.profiling.gpu.stages.results_file import read_results

LINES, VARIANTS = "kernels.jsonl", "measured.json"
#: Rows that were timed, and the row counts that take the variant.
_SERVED = {1: (1,), 4: (4,), 16: (8, 16)}
_PARAMETERS = ("row_tiles", "warps", "unroll", "depth", "min_blocks")
_SECONDS, _DRY_SECONDS, _SPARE_S = 45, 20, 15
_KEPT_EVENTS = ("best", "step", "check_step", "torch", "error", "fatal", "skipped", "end")


def run(kit: Kit) -> None:
    """Tune, and write measured.json beside the results. In a dry run the kernels run in emulation on the CPU."""
    folder = kit.results.path.parent
    lines = folder / LINES
    lines.unlink(missing_ok=True)  # what is there is taken for done
    target = card_target() if kit.machine.is_card else "sm90"
    seconds = _SECONDS if kit.machine.is_card else _DRY_SECONDS
    command = [sys.executable, "-m", "starling.profiling.gpu.tune_kernels", "--seconds", str(seconds)]
    command += ["--out", str(lines), "--arch", target.replace("sm", "sm_")]
    command += [] if kit.machine.is_card else ["--emulate"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds + _SPARE_S, env=dict(os.environ), check=False
    )
    found = read_results(lines)
    checks = [line for line in found if "ok" in line]
    kit.results.write(
        exit_code=done.returncode,
        message=done.stderr[-300:],
        right=sum(line["ok"] for line in checks),
        wrong=[line for line in checks if not line["ok"]][:6],
    )
    for line in found:
        if line["event"] in _KEPT_EVENTS:
            kit.results.write(**{key: value for key, value in line.items() if key not in ("at_s", "key")})
    if kit.machine.is_card:
        known = json.loads(MEASURED.read_text(encoding="utf-8"))
        known[target] = measured_variants(found)
        (folder / VARIANTS).write_text(as_measured(known), encoding="utf-8")


def measured_variants(lines: Iterable[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """The best variant of each int8 product, under "k,n,rows,epilogue"."""
    variants = {}
    for line in lines:
        if line.get("event") != "best" or line.get("bits") != 8 or "product" not in line:
            continue
        variant = line["variant"]
        chosen = {name: variant[name] for name in _PARAMETERS} | {"persistent": line["persistent"]}
        for rows in _SERVED.get(line["m"], ()):
            variants[f"{variant['k']},{line['n']},{rows},{variant['epilogue']}"] = chosen
    return variants


def as_measured(targets: dict[str, dict[str, dict[str, int]]]) -> str:
    """The text of engine/kernels/cuda/measured.json: a variant a line, in order."""
    blocks = []
    for target, variants in sorted(targets.items()):
        rows = [f'  "{key}": {json.dumps(variants[key])}' for key in sorted(variants)]
        blocks.append(f' "{target}": {{\n' + ",\n".join(rows) + "\n }")
    return "{\n" + ",\n".join(blocks) + "\n}\n"
