"""The commands that a command names as the next one, ready to be pasted into a shell."""

from __future__ import annotations

import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from starling.engine.names import DEFAULT_MAX_SEQ

if TYPE_CHECKING:
    from starling.engine.backends.tensorrt.plan_record import EngineRecord
    from starling.engine.bundle.manifest import Bundle

#: The prompt of every example that a command prints.
EXAMPLE_PROMPT = "What is the capital of South Korea?"
#: What to build for where no GPU says it: RTX 40, L4, L40S; it computes in every type that a bundle may have.
EXAMPLE_TARGET = "sm89"


def quoted(path: Path | str) -> str:
    """A path as a shell takes it for one word, and a command for no option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def generate_command(folder: Path, *options: str) -> str:
    """`starling generate` with the example's prompt."""
    return " ".join(["starling generate", quoted(folder), f'"{EXAMPLE_PROMPT}"', *options])


def after_export(bundle: Bundle) -> str:
    """The line that tells what to do with a new bundle."""
    folder = quoted(bundle.folder)
    runs = bundle.dtype != "bf16" or bundle.kernel_graph is not None
    if bundle.task != "generate":
        return f'next: starling score {folder} "{EXAMPLE_PROMPT}"' if runs else f"next: starling inspect {folder}"
    if bundle.dialect == "tensorrt":
        return f"next: starling build {folder}{_build_options()}"
    if bundle.dialect == "canonical":  # the reference that others are measured against; nothing here runs it in bf16
        return f"next: starling {'inspect' if bundle.dtype == 'bf16' else 'evaluate'} {folder}"
    if not runs:
        return f"next, on a machine with CUDA: {generate_command(bundle.folder, '--backend onnxruntime-cuda')}"
    return f"next: {generate_command(bundle.folder)}"


def after_build(bundle: Bundle, record: EngineRecord) -> str:
    """The line that tells what to do with a new engine."""
    options = [f"--backend {record.runtime}", f"--engine {record.name}"]
    if record.max_seq < min(DEFAULT_MAX_SEQ, bundle.architecture.max_positions):
        options.append(f"--max-seq {record.max_seq}")
    where = f"on a GPU of {' or '.join(record.targets)}"
    return f"next, {where}: {generate_command(bundle.folder, *options)}"


def _build_options() -> str:
    """` --runtime …` as it can be had here, and ` --target …` where no GPU says what to build for."""
    from starling.engine.backends.tensorrt.build.targets import present_target

    if find_spec("tensorrt") is not None and find_spec("tensorrt_rtx") is None:
        return " --runtime tensorrt"  # builds for the GPU that is present, and takes no other target
    return " --runtime tensorrt-rtx" + ("" if present_target() else f" --target {EXAMPLE_TARGET}")
