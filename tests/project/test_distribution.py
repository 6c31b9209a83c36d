"""What is built to be published, in environments of their own: it installs, runs, and says what it lacks.

They take packages from an index, and minutes: `make test-install` runs them.
"""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from command_line import CHECKOUT
from filelock import FileLock
from http_server import MODEL, serving
from test_typing import BAD, GOOD

from starling import __version__

pytestmark = [
    pytest.mark.install,
    pytest.mark.skipif(sys.platform != "linux", reason="wheels with kernels are built on Linux"),
]
PYTHONS = ("3.11", "3.12", "3.13")
QUESTION = "What is the capital of France, and what is it known for?"
LEFT_OUT = (".git", ".venv*", "*.egg-info", "__pycache__", ".*_cache", "*.so")
#: At the top alone: a package may have such a name.
LEFT_OUT_AT_THE_TOP = {"build", "dist"}
ROOMS = ("cli", "engine", "export", "profiling", "serving")


@pytest.fixture(scope="session")
def built(bundles: Path) -> Path:
    """The folder that `make dist` leaves, made from a copy of the checkout."""
    folder = bundles / "dist"
    with FileLock(bundles / "dist.lock"):
        if not folder.exists():
            copy = copied_checkout(bundles / "checkout")
            (copy / ".venv").symlink_to(Path(sys.prefix))
            run("make", "--old-file=.venv/installed", "dist", cwd=copy)
            shutil.copytree(copy / "dist", folder)
    return folder


@pytest.fixture(scope="session")
def wheel(built: Path) -> Path:
    """The wheel with the CPU kernels."""
    [file] = built.glob("*manylinux*.whl")
    return file


@pytest.fixture(scope="session")
def sdist(built: Path) -> Path:
    """The source distribution."""
    [file] = built.glob("*.tar.gz")
    return file


def copied_checkout(to: Path) -> Path:
    """The checkout without what was built in it; links stay links."""

    def left_out(folder: str, names: list[str]) -> set[str]:
        found = shutil.ignore_patterns(*LEFT_OUT)(folder, names)
        return found | LEFT_OUT_AT_THE_TOP if Path(folder) == CHECKOUT else found

    shutil.copytree(CHECKOUT, to, symlinks=True, ignore=left_out)
    return to


def run(*command: str | Path, cwd: Path = Path("/"), code: int = 0, **env: str) -> str:
    """Both outputs of a command that must end with this exit code, run where no checkout is on Python's path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = [str(word) for word in command]
    finished = subprocess.run(words, cwd=cwd, env=inherited | env, capture_output=True, text=True, check=False)
    assert finished.returncode == code, finished.stdout + finished.stderr
    return finished.stdout + finished.stderr


def interpreter(version: str) -> Path:
    """A Python of this version; the test is skipped where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [Path(sys.executable), *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
    candidates += [Path(found)] if (found := shutil.which(f"python{version}")) else []
    for python in candidates:
        asked = [str(python), "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == version:
            return python
    pytest.skip(f"no Python {version} here")


def environment(folder: Path, version: str, *requirements: str, **env: str) -> Path:
    """The Python of a new environment with these requirements."""
    run(interpreter(version), "-m", "venv", folder)
    python = folder / "bin" / "python"
    if requirements:
        run(python, "-m", "pip", "install", "--quiet", *requirements, **env)
    return python


def install_torch_for_cpu(python: Path) -> None:
    """The CPU build of the PyTorch that the tests use; the test is skipped where pip has none for this Python."""
    # By its full version: pip would take a build with CUDA, gigabytes, for the plain one.
    torch = importlib.metadata.version("torch").partition("+")[0] + "+cpu"
    install = [str(python), "-m", "pip", "install", "--quiet", f"torch=={torch}"]
    if subprocess.run(install, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"pip finds no torch {torch} for this Python")


def contents(archive: Path) -> set[str]:
    """The files of a wheel."""
    with zipfile.ZipFile(archive) as files:
        return {name for name in files.namelist() if ".dist-info/" not in name and not name.endswith("/")}


def test_one_wheel_with_kernels_one_without_and_the_sources(built: Path) -> None:
    names = sorted(file.name for file in built.iterdir())
    stem = f"starling_llm-{__version__}"
    assert names == [
        f"{stem}-py3-none-any.whl",
        f"{stem}-py3-none-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
        f"{stem}.tar.gz",
    ]
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())


def test_the_wheels_differ_by_the_library_alone(built: Path, wheel: Path) -> None:
    [pure] = built.glob("*any.whl")
    assert contents(wheel) - contents(pure) == {"starling/engine/kernels/_library.so"}
    assert contents(pure) < contents(wheel)
    modules = {file.relative_to(CHECKOUT) for room in ROOMS for file in (CHECKOUT / room).rglob("*.py")}
    assert {f"starling/{name}" for name in modules} <= contents(pure)


def test_the_sources_have_what_it_takes_to_test_deploy_and_read_them(sdist: Path) -> None:
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    for name in ("Makefile", "constraints.txt", "README.md", "LICENSE", "setup.py", "docs/triton.md"):
        assert name in names
    assert {"deploy/Dockerfile", "tests/conftest.py", "tests/data/smollm2_llama_cpp_ids.json"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_a_checkout_whose_file_system_has_no_links_gives_the_same_wheel(built: Path, tmp_path: Path) -> None:
    copy = copied_checkout(tmp_path / "checkout")
    for room in ROOMS:
        (copy / "starling" / room).unlink()
        (copy / "starling" / room).write_text(f"../{room}")  # what git leaves where it cannot make links
    build = (sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / "dist", copy)
    run(*build, STARLING_BUILD_KERNELS="0")
    [made] = (tmp_path / "dist").glob("*.whl")
    [pure] = built.glob("*any.whl")
    assert contents(made) == contents(pure)


@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_runs_with_the_newest_packages(
    version: str, wheel: Path, demo_int8_bundle: Path, tmp_path: Path
) -> None:
    python = environment(tmp_path / "venv", version, f"{wheel}[cpu,serve]")
    answers_and_serves(python, demo_int8_bundle)
    assert re.search(r"yes +CPU kernels", run(python, "-m", "starling", "doctor"))
    where = run(python, "-c", "import starling.engine.kernels as kernels; print(kernels.require_kernel_library().path)")
    assert Path(where.strip()).is_relative_to(tmp_path / "venv")
    # A folder of that name above does not get in the way: a clone of the project, say.
    (tmp_path / "above" / "starling").mkdir(parents=True)
    shown = run(python, "-c", "import starling; print(starling.__file__)", cwd=tmp_path / "above")
    assert Path(shown.strip()).is_relative_to(tmp_path / "venv")


@pytest.mark.parametrize("version", PYTHONS)
def test_the_wheel_exports_with_the_newest_packages(version: str, wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", version)
    install_torch_for_cpu(python)
    run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu,export]")
    bundle = tmp_path / "bundle"
    shown = run(python, "-m", "starling", "export", "demo", bundle, "--quant", "int8")
    assert f"{bundle}: " in shown
    assert "parity: " in shown
    assert "Paris" in run(python, "-m", "starling", "generate", bundle, QUESTION, "--max-tokens", "24")


@pytest.mark.parametrize("version", PYTHONS[:1])
def test_the_wheel_runs_with_the_lowest_versions_that_it_allows(
    version: str, wheel: Path, demo_int8_bundle: Path, tmp_path: Path
) -> None:
    lowest = tmp_path / "lowest.txt"
    resolve = ("uv", "pip", "compile", "--quiet", "--resolution", "lowest-direct", "--python-version", version)
    run(sys.executable, "-m", *resolve, "--extra", "cpu", "--extra", "serve", "-o", lowest, CHECKOUT / "pyproject.toml")
    python = environment(tmp_path / "venv", version, "--constraint", str(lowest), f"{wheel}[cpu,serve]")
    answers_and_serves(python, demo_int8_bundle)


def test_without_a_compiler_the_sources_install_and_say_how_to_get_the_kernels(
    sdist: Path, demo_int8_bundle: Path, tmp_path: Path
) -> None:
    no_compiler = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    python = environment(tmp_path / "venv", PYTHONS[0], "--no-cache-dir", f"{sdist}[cpu,serve]", **no_compiler)
    found = run(python, "-m", "starling", "doctor")
    again = re.search(r"no +CPU kernels: not built: .* (pip install --force-reinstall --no-cache-dir .*?);", found)
    assert again is not None, found
    answers_and_serves(python, demo_int8_bundle)
    run("bash", "-c", f"{python} -m {again[1]}")
    assert re.search(r"yes +CPU kernels", run(python, "-m", "starling", "doctor"))


def test_type_checkers_resolve_the_wheel(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", PYTHONS[0], str(wheel))
    (tmp_path / "program.py").write_text(GOOD)
    check = (sys.executable, "-m", "basedpyright", "--level", "error", "--pythonpath", python, "program.py")
    assert "0 errors" in run(*check, cwd=tmp_path)
    (tmp_path / "program.py").write_text(f'from starling.engine import Engine\n\nengine = Engine("b")\n{BAD[0]}\n')
    assert "1 error" in run(*check, cwd=tmp_path, code=1)


def test_a_hint_names_the_wheel_that_was_installed(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv", PYTHONS[0], str(wheel))
    line = run(python, "-m", "starling", "export", "demo", tmp_path / "out", code=1)
    assert f"which is not installed: pip install '{wheel}[export]'" in line


def answers_and_serves(python: Path, bundle: Path) -> None:
    """`generate` by the command, and a chat by the real client of a server of this environment."""
    assert run(python, "-m", "starling", "--version").strip() == f"starling, version {__version__}"
    assert "Paris" in run(python, "-m", "starling", "generate", bundle, QUESTION, "--max-tokens", "24")
    without_checkout = {"PYTHONSAFEPATH": "1", "PYTHONPATH": ""}
    with serving(bundle, "--max-seq", "512", python=python, env=without_checkout) as server:
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        reply = server.client().chat.completions.create(model=MODEL, messages=messages, max_tokens=24, temperature=0)
    assert "Paris" in str(reply.choices[0].message.content)
