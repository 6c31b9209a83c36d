"""Bundles that many tests share, exported once a session through the same code as the command line."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.checkpoints.scoring_models import for_task
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization

# A job started in the background ignores Ctrl-C, one under nohup SIGHUP, and so do their children: tests send both.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# Fixtures that export the real model or a plan: what uses them is not quick.
SLOW_FIXTURES = frozenset({"demo_checkpoint", "demo_bundle", "demo_int8_bundle"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what needs the real model; modules mark the rest themselves."""
    for item in items:
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--rounds`: how often tests/hostile tries its usual number of inputs."""
    parser.addoption("--rounds", type=int, default=1, help="tests/hostile: so many times as many inputs")


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> int:
    """How many times as many hostile inputs as usual."""
    return int(request.config.getoption("--rounds"))


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the shared bundles, one for all processes of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    (folder / "bundles").mkdir(exist_ok=True)
    return folder / "bundles"


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Checkpoint:
    """Random weights of Starling's head layout, with the real Starling tokenizer."""
    return open_checkpoint("random:starling-tiny")


@pytest.fixture(scope="session")
def demo_checkpoint() -> Checkpoint:
    """SmolLM2-135M-Instruct, the real model."""
    return open_checkpoint("demo")


@pytest.fixture(scope="session")
def tiny_bundle(bundles: Path, tiny_checkpoint: Checkpoint) -> Path:
    """starling-tiny, fp32, ort dialect, compared with PyTorch."""
    return _export(tiny_checkpoint, bundles / "tiny", ExportOptions(check=True))


@pytest.fixture(scope="session")
def tiny_tensorrt_bundle(bundles: Path, tiny_checkpoint: Checkpoint) -> Path:
    """starling-tiny, fp32, tensorrt dialect."""
    return _export(tiny_checkpoint, bundles / "tiny-tensorrt", ExportOptions(dialect="tensorrt", check=False))


@pytest.fixture(scope="session")
def demo_bundle(bundles: Path, demo_checkpoint: Checkpoint) -> Path:
    """SmolLM2, fp32, ort dialect, compared with PyTorch."""
    return _export(demo_checkpoint, bundles / "demo", ExportOptions())


@pytest.fixture(scope="session")
def demo_int8_bundle(bundles: Path, demo_checkpoint: Checkpoint) -> Path:
    """SmolLM2, weight-only INT8, compared with PyTorch."""
    return _export(demo_checkpoint, bundles / "demo-int8", ExportOptions(quantization=BlockQuantization("int8")))


@pytest.fixture(scope="session")
def reward_bundle(bundles: Path, tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random trunk with a v_head, 512 positions, with Starling's chat templates."""
    from tiny_scorers import reward_module, save_reward_module

    folder = save_reward_module(reward_module(512), tiny_checkpoint, tmp_path_factory.mktemp("reward") / "model")
    template = tiny_checkpoint.tokenizer.chat_template or ""
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return _export(open_checkpoint(str(folder)), bundles / "reward", ExportOptions(check=False))


@pytest.fixture(scope="session")
def classifier_bundle(bundles: Path, tiny_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with three labels."""
    from families import Family
    from tiny_scorers import classifier_folder

    folder, labels = tmp_path_factory.mktemp("classifier") / "model", {0: "bad", 1: "so so", 2: "good"}
    classifier_folder(Family("llama", "llama"), tiny_checkpoint, folder, id2label=labels)
    return _export(open_checkpoint(str(folder)), bundles / "classifier", ExportOptions(check=False))


@pytest.fixture(scope="session")
def embedding_bundle(bundles: Path, tiny_checkpoint: Checkpoint) -> Path:
    """starling-tiny for embeddings, fp32."""
    return _export(for_task(tiny_checkpoint, "embed"), bundles / "embedding", ExportOptions(check=False))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts an empty memory file system of the given limits."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(limits: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", limits, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("mounting a small file system takes root")
        return folder

    yield mount
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)


def _export(checkpoint: Checkpoint, out: Path, options: ExportOptions) -> Path:
    with FileLock(out.with_suffix(".lock")):
        if not out.exists():
            export_bundle(checkpoint, out, options)
    return out
