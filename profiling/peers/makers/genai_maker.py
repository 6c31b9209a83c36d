"""Models of onnxruntime-genai, by its own builder. Options: `precision`, `provider`, `extra_options`."""

import subprocess
import sys
from pathlib import Path
from typing import Any


def make(checkpoint: Path, out: Path, options: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(out)]
    command += ["-c", str(out / "cache"), "-p", options["precision"], "-e", options["provider"]]
    extra = ["hf_token=false", *(f"{name}={value}" for name, value in options.get("extra_options", {}).items())]
    # Its own last line is the one to show, so no exception after it.
    if code := subprocess.run([*command, "--extra_options", *extra], check=False).returncode:
        sys.exit(code)
