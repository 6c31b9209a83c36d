"""A 64-bit ARM Linux in a folder, whose Python runs here under QEMU's user mode: `python emulated_arm.py FOLDER`.

Debian's own Python for ARM, and the wheels of ONNX Runtime and the others for ARM. What the kernels compute there is
right or wrong as on a processor; how long it takes says nothing.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "arm"
COMPILER = "aarch64-linux-gnu-g++"
#: Programs, and the Debian packages that have them.
PROGRAMS = {
    COMPILER: "g++-aarch64-linux-gnu",
    "qemu-aarch64": "qemu-user",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
}
DEBIAN_PACKAGES = ("python3", "libstdc++6")
PYTHON_PACKAGES = (
    "onnxruntime",
    "jinja2",
    "llguidance",
    "ml_dtypes",
    "numpy",
    "onnx",
    "pytest",
    "rich",
    "tokenizers",
)
#: Wheels may be for any of these: pip takes them by name.
PLATFORMS = ("manylinux2014_aarch64", *(f"manylinux_2_{minor}_aarch64" for minor in range(17, 37)))
# An apt of its own, which leaves the system's as it is; its sources and keys are the system's.
APT = """\
Dir::State "{folder}/state";
Dir::State::status "{folder}/state/status";
Dir::Cache "{folder}/cache";
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
"""
# ONNX Runtime looks there for the processor's parts, and QEMU 7 shows it this machine's. A Cortex-A72, which has less
# than any other that is emulated here.
CPUINFO = """\
processor\t: {core}
BogoMIPS\t: 100.00
Features\t: fp asimd aes pmull sha1 sha2 crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3

"""


def missing_packages() -> list[str]:
    """Debian packages whose programs are not here."""
    return [package for program, package in PROGRAMS.items() if shutil.which(program) is None]


@dataclass(frozen=True)
class EmulatedArm:
    """`system` is ARM's Debian, `packages` its Python's; `starling` this checkout's wheel for ARM, unpacked."""

    folder: Path

    @property
    def system(self) -> Path:
        return self.folder / "system"

    @property
    def packages(self) -> Path:
        return self.folder / "packages"

    @property
    def starling(self) -> Path:
        return self.folder / "starling"

    @property
    def python(self) -> Path:
        return self.system / "usr" / "bin" / "python3"

    def is_prepared(self) -> bool:
        return self.system.is_dir() and self.packages.is_dir()

    def prepare(self) -> None:
        """Downloads what is not there yet."""
        if not self.system.is_dir():
            self._install_system()
        if not self.packages.is_dir():
            self._install_packages()

    def build(self) -> Path:
        """Compiles this checkout for ARM, unpacks its wheel, and gives its path."""
        made = self.folder / "build"
        for folder in (made, self.starling):
            shutil.rmtree(folder, ignore_errors=True)
        made.mkdir()
        compiled_for = {
            "_PYTHON_HOST_PLATFORM": "linux-aarch64",
            "CC": COMPILER,
            "CXX": COMPILER,
            "STARLING_BUILD_KERNELS": "1",
        }
        command = [sys.executable, "setup.py", "--quiet", "egg_info", f"--egg-base={made}", "build"]
        command += [f"--build-base={made}", "bdist_wheel", f"--bdist-dir={made / 'bdist'}", f"--dist-dir={made}"]
        subprocess.run(command, cwd=ROOT, env=os.environ | compiled_for, check=True)
        [wheel] = made.glob("*.whl")
        with zipfile.ZipFile(wheel) as files:
            files.extractall(self.starling)
        return wheel

    def run(self, processor: str, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """ARM's Python with these arguments on a processor that QEMU knows, with what it printed."""
        # QEMU 7's streaming vectors (SME) give wrong sums in ONNX Runtime's own products.
        cpu = "max,sme=off" if processor == "max" else processor
        paths = {"PYTHONPATH": f"{self.starling}:{self.packages}", "PYTHONDONTWRITEBYTECODE": "1"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("STARLING_", "PYTEST_"))}
        command = ["qemu-aarch64", "-cpu", cpu, "-L", str(self.system), str(self.python.resolve()), "-P", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=kept | paths | environment, capture_output=True, text=True, check=False
        )

    def _install_system(self) -> None:
        state = self.folder / "apt"
        (state / "state" / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (state / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        (state / "state" / "status").touch()
        (state / "apt.conf").write_text(APT.format(folder=state), encoding="utf-8")
        environment = os.environ | {"APT_CONFIG": str(state / "apt.conf")}
        install = ["install", "--yes", "--no-install-recommends", "--download-only", *DEBIAN_PACKAGES]
        for command in (["update"], install):
            subprocess.run(["apt-get", "--quiet", "--quiet", *command], env=environment, check=True)
        unfinished = self.folder / "system.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        for archive in sorted((state / "cache" / "archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "--extract", str(archive), str(unfinished)], check=True)
        (unfinished / "proc").mkdir(exist_ok=True)
        cores = "".join(CPUINFO.format(core=core) for core in range(os.cpu_count() or 1))
        (unfinished / "proc" / "cpuinfo").write_text(cores, encoding="utf-8")
        unfinished.rename(self.system)

    def _install_packages(self) -> None:
        unfinished = self.folder / "packages.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        version = self.python.resolve().name.removeprefix("python")
        platforms = [f"--platform={name}" for name in PLATFORMS]
        command = [sys.executable, "-m", "pip", "install", "--quiet", f"--target={unfinished}", *platforms]
        command += ["--only-binary=:all:", f"--python-version={version}", f"--constraint={ROOT / 'constraints.txt'}"]
        subprocess.run([*command, *PYTHON_PACKAGES], check=True)
        unfinished.rename(self.packages)


def main(folder: Path) -> int:
    """Prepare the folder, and give the exit code."""
    if missing := missing_packages():
        print(f"missing here: {', '.join(missing)}. On Debian: apt-get install {' '.join(missing)}", file=sys.stderr)
        return 2
    EmulatedArm(folder.resolve()).prepare()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
