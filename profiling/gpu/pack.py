"""Make the kit that measures a GPU: graphs without weights and ONNX Runtime for one architecture, in one small folder.

    python -m starling.profiling.gpu.pack OUT [--wheel onnxruntime_gpu-….whl]

OUT and a checkout are all that the GPU's machine needs beside PyTorch and transformers: `on_card` runs from them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starling.engine.errors import StarlingError, UserError
from starling.engine.kernels import KernelsUnavailable, require_kernel_library
from starling.profiling.gpu.packing import ARCHIVE
from starling.profiling.gpu.packing.bare_bundles import BUNDLES, write_bare_bundles
from starling.profiling.gpu.packing.small_runtime import VERSION, download, write_small_runtime
from starling.profiling.gpu.stages import GRAPHS, KERNEL_LIBRARY, KIT_FILE
from starling.profiling.gpu.stages.stage_table import STAGES

#: What may be carried to such a machine in one go.
MOST_BYTES = 60_000_000


def pack(
    out: Path, *, names: list[str], wheel: Path | None, runtime: bool, architecture: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Write the kit to `out`; what KIT_FILE says of it. Raises StarlingError where something cannot be had."""
    if out.exists():
        raise UserError(f"{out} exists; give another folder")
    unknown = set(names) - {bundle.name for bundle in BUNDLES}
    if unknown:
        raise UserError(f"no such bundle: {', '.join(sorted(unknown))}")
    (out / GRAPHS).mkdir(parents=True)
    write_bare_bundles(out / GRAPHS, [bundle for bundle in BUNDLES if bundle.name in names], say)
    if runtime:
        _write_runtime(out / ARCHIVE, wheel, architecture, say)
    _copy_kernel_library(out / KERNEL_LIBRARY, say)
    about = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "bundles": names,
        "onnxruntime-gpu": VERSION if runtime else None,
        "architecture": architecture if runtime else None,
    }
    (out / KIT_FILE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return about


def _write_runtime(archive: Path, wheel: Path | None, architecture: int, say: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            say(f"downloading onnxruntime-gpu {VERSION}")
            wheel = download(Path(folder))
        say(f"packing {wheel.name} for sm_{architecture}")
        write_small_runtime(wheel, archive, architecture, say)


def _copy_kernel_library(target: Path, say: Callable[[str], None]) -> None:
    """Git leaves it out of a checkout, and the GPU's machine may have no compiler."""
    try:
        shutil.copy(require_kernel_library().path, target)
    except KernelsUnavailable as error:
        say(f"without the kernels' library, so that our CUDA kernels cannot run: {error}")


def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None where this is no checkout of git."""
    here = Path(__file__).resolve().parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=7", "HEAD")
    return head and (f"{head}+" if git("status", "--porcelain", "--untracked-files=no") else head)


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--wheel", type=Path, help="onnxruntime-gpu for Python 3.12; by default pip downloads it")
    parser.add_argument("--architecture", type=int, default=90, help="the card's compute capability, 90 for 9.0")
    parser.add_argument("--bundles", default=",".join(bundle.name for bundle in BUNDLES), help="by default all")
    parser.add_argument("--no-runtime", action="store_true", help="leave ONNX Runtime out")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        pack(
            arguments.out,
            names=arguments.bundles.split(","),
            wheel=arguments.wheel,
            runtime=not arguments.no_runtime,
            architecture=arguments.architecture,
            say=say,
        )
    except StarlingError as error:
        say(str(error))
        return 2 if isinstance(error, UserError) else 1
    total = size(arguments.out)
    print(f"{arguments.out}: {total / 1e6:.1f} MB{', more than is meant to be carried' if total > MOST_BYTES else ''}")
    print("On the GPU's machine, in a checkout, with this folder beside it:")
    wanted = " ".join(f"{stage.name}:{stage.seconds}" for stage in STAGES)
    print(f"  python3 -m starling.profiling.gpu.on_card WORK {arguments.out.name}/{GRAPHS} {wanted}")
    for stage in STAGES:
        print(f"  {stage.name:12} {stage.says}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
