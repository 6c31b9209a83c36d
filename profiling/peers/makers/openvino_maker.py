"""Models of OpenVINO, by optimum-intel. Options: `weight_format`, and `arguments` for its command line."""

import subprocess
import sys
from pathlib import Path
from typing import Any


def make(checkpoint: Path, out: Path, options: dict[str, Any]) -> None:
    program = str(Path(sys.executable).with_name("optimum-cli"))
    command = [
        sys.executable,
        program,
        "export",
        "openvino",
        "--model",
        str(checkpoint),
        "--task",
        "text-generation-with-past",
    ]
    command += ["--weight-format", options["weight_format"], *options.get("arguments", [])]
    # Its own last line is the one to show, so no exception after it.
    if code := subprocess.run([*command, str(out)], check=False).returncode:
        sys.exit(code)
