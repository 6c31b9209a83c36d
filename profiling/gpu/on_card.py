"""Measure a GPU on a machine that is there for minutes, from a checkout and the folder that `pack` made.

    python -m starling.profiling.gpu.on_card WORK KIT/graphs correctness:90 int8:90 …

Each stage is a process of its own that is ended after its seconds; every result is a line of JSON, in OUT/results.jsonl
as soon as it is there. PyTorch and transformers must be installed, nothing is downloaded. `--cpu` is a dry run: small
models on ONNX Runtime's CPU provider, so that the kit itself is known to work when a card comes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from time import perf_counter
from typing import IO

import starling
from starling.profiling.gpu.packing import ARCHIVE
from starling.profiling.gpu.stages import KERNEL_LIBRARY
from starling.profiling.gpu.stages.kit import Kit
from starling.profiling.gpu.stages.machines import CpuMachine, CudaMachine
from starling.profiling.gpu.stages.results_file import FILE, Results
from starling.profiling.gpu.stages.stage_table import STAGES, Stage

_CHECKOUT = Path(starling.__file__).resolve().parents[1]
_ENVIRONMENT = Stage("environment", "environment_line:run", 60, "device, driver, versions, date")
_BY_NAME = {stage.name: stage for stage in (_ENVIRONMENT, *STAGES)}
_LOG, _SHOWN = "log.txt", 600
_TIMED_OUT = 124  # as the command timeout says it


def main() -> int:
    arguments = _arguments()
    for folder in (arguments.work, arguments.out):
        folder.mkdir(parents=True, exist_ok=True)
    if arguments.alone:
        return _run_here(arguments, arguments.stages[0])
    path = _python_path(arguments.work, arguments.graphs.parent)
    _place_kernel_library(arguments.graphs.parent)
    failed = 0
    for wanted in (_ENVIRONMENT.name, *arguments.stages):
        name, _, seconds = wanted.partition(":")
        failed += _run_apart(arguments, name, int(seconds or _BY_NAME[name].seconds), path) != 0
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path, help="a folder for bundles with weights: 23 GB, best in memory")
    parser.add_argument("graphs", type=Path, help="the folder graphs of what `pack` made")
    parser.add_argument("stages", nargs="+", metavar="STAGE:SECONDS", help=f"of {', '.join(_BY_NAME)}")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="where the results go")
    parser.add_argument("--cpu", action="store_true", help="a dry run without a GPU")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [stage for stage in arguments.stages if stage.partition(":")[0] not in _BY_NAME]
    if unknown:
        parser.error(f"no such stage: {', '.join(unknown)}")
    return arguments


def _run_here(arguments: argparse.Namespace, name: str) -> int:
    results = Results(arguments.out / FILE, name)
    machine = CpuMachine() if arguments.cpu else CudaMachine()
    ended_well = False
    with results.guarded():
        _BY_NAME[name].function()(Kit(arguments.work, arguments.graphs, results, machine))
        ended_well = True
    return 0 if ended_well else 1


def _run_apart(arguments: argparse.Namespace, name: str, seconds: int, path: str) -> int:
    """The stage's exit code."""
    command = [sys.executable, "-u", "-m", "starling.profiling.gpu.on_card", str(arguments.work)]
    command += [str(arguments.graphs), name, "--out", str(arguments.out), "--alone"]
    command += ["--cpu"] if arguments.cpu else []
    begin = perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
    )
    assert process.stdout is not None
    showing = Thread(target=_show, args=(process.stdout, arguments.out / _LOG), daemon=True)
    showing.start()
    results = Results(arguments.out / FILE, name)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        _end(process)
        code = _TIMED_OUT
        results.write(failed=f"not done after {seconds} s")
    showing.join(5)
    results.write(done_s=round(perf_counter() - begin, 1), exit_code=code)
    return code


def _end(process: subprocess.Popen[str]) -> None:
    """With the processes that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _show(lines: IO[str], log: Path) -> None:
    """Whole to the log, their beginnings to stdout."""
    with log.open("a", encoding="utf-8") as file:
        for line in lines:
            file.write(line)
            file.flush()
            print(line.rstrip("\n")[:_SHOWN], flush=True)


def _python_path(work: Path, kit: Path) -> str:
    """The checkout, and the kit's ONNX Runtime where it has one."""
    folders: Sequence[str] = [str(_CHECKOUT)]
    if (kit / ARCHIVE).is_file():
        folders = [*folders, str(_unpacked(kit / ARCHIVE, work / "site"))]
    return os.pathsep.join([*folders, *filter(None, [os.environ.get("PYTHONPATH")])])


def _unpacked(archive: Path, site: Path) -> Path:
    """ONNX Runtime in a folder of its own, in which it finds CUDA's libraries as PyTorch brings them."""
    if not site.exists():
        draft = site.with_name("site.new")
        shutil.rmtree(draft, ignore_errors=True)
        with tarfile.open(archive) as packed:
            packed.extractall(draft, filter="data")
        found = find_spec("nvidia")
        if found is not None and found.submodule_search_locations:
            (draft / "nvidia").symlink_to(next(iter(found.submodule_search_locations)))
        draft.rename(site)
    return site


def _place_kernel_library(kit: Path) -> None:
    """Git leaves the library out of a checkout."""
    place = _CHECKOUT / "engine" / "kernels" / KERNEL_LIBRARY
    if not place.exists() and (kit / KERNEL_LIBRARY).is_file():
        shutil.copy(kit / KERNEL_LIBRARY, place)


if __name__ == "__main__":
    sys.exit(main())
