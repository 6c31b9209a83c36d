"""The kernel tests and hostile operator calls with kernels that GCC's address and undefined-behaviour sanitizers watch.

`python sanitize.py FOLDER [CASES]`: FOLDER gets the package, linked from the checkout, with a library of its own.
What reads or writes outside its memory, or overflows, ends the process with a report.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from setup_script import ROOT, kernel_library

KERNELS = ROOT / "engine" / "kernels"
FLAGS = (
    *("-std=c++17", "-O1", "-g", "-fno-omit-frame-pointer", "-ffp-contract=off", "-fvisibility=hidden", "-w"),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fPIC", "-shared", f"-I{KERNELS}"),
)
# Python and ONNX Runtime keep memory to their end, and free what another library's operator new has made.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
}
CASES = "2000"
# Their tests without an engine or an export, which start processes whose memory is bounded: the sanitizers exceed it.
KERNEL_TESTS = ("tests/engine/test_kernels.py", "tests/engine/test_half_kernels.py")


def link_package(folder: Path) -> Path:
    """A package `starling` in the folder, linked from the checkout but for the kernels' library; that one's path."""
    package = folder / "starling"
    kernels = package / "engine" / "kernels"
    shutil.rmtree(folder, ignore_errors=True)
    kernels.mkdir(parents=True)
    for source, target in ((ROOT / "starling", package), (ROOT / "engine", package / "engine"), (KERNELS, kernels)):
        for entry in source.iterdir():
            if not (target / entry.name).exists() and entry.suffix != ".so":
                (target / entry.name).symlink_to(entry.resolve())
    return kernels / "_library.so"


def build(library: Path) -> None:
    """Compile the kernels, one process for each source file."""
    compiled = kernel_library()
    if compiled is None:
        sys.exit("there are no CPU kernels for this platform")
    objects = {ROOT / source: library.parent / f"{Path(source).stem}.o" for source in compiled.sources}
    compiler = os.environ.get("CXX", "g++")
    compile_flags = [flag for flag in FLAGS if flag != "-shared"]
    running = [
        subprocess.Popen([compiler, *compile_flags, "-c", str(source), "-o", str(made)])
        for source, made in objects.items()
    ]
    if any(process.wait() != 0 for process in running):
        sys.exit("the kernels were not compiled")
    subprocess.run([compiler, *FLAGS, *map(str, objects.values()), "-o", str(library)], check=True)


def runtime_libraries() -> str:
    """The sanitizers' libraries, which must be loaded first, and the C++ library that they look into."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    command = [os.environ.get("CXX", "g++"), "-print-file-name="]
    found = (subprocess.check_output([*command[:-1], command[-1] + name], text=True).strip() for name in names)
    return " ".join(found)


def main(folder: Path, cases: str = CASES) -> int:
    """Build, run both, and give the exit code."""
    library = link_package(folder.resolve())
    build(library)
    environment = os.environ | OPTIONS | {"PYTHONPATH": str(folder.resolve()), "LD_PRELOAD": runtime_libraries()}
    python = [sys.executable, "-P"]  # not the checkout's own package
    where = "import starling.engine.kernels as kernels; print(kernels.require_kernel_library().path)"
    loaded = subprocess.check_output([*python, "-c", where], env=environment, text=True).strip()
    if loaded != str(library):
        sys.exit(f"{loaded} is loaded, not {library}")
    for arguments in (
        ["tests/hostile/operator_cases.py", cases, "1"],
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", *KERNEL_TESTS, "-k", "not InTheEngine", "-m", "not slow"],
    ):
        finished = subprocess.run([*python, *arguments], cwd=ROOT, env=environment, check=False)
        if finished.returncode != 0:
            return finished.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
