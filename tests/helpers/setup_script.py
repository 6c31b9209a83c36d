"""What setup.py would build, asked in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_ASK = """
import json, setuptools, distutils.core
made = distutils.core.run_setup("setup.py", stop_after="init").ext_modules
print(json.dumps([{"sources": each.sources, "flags": each.extra_compile_args} for each in made]))
"""


@dataclass(frozen=True)
class Compiled:
    """The sources of a library, relative to the checkout, and the compiler's flags."""

    sources: list[str]
    flags: list[str]


def kernel_library(platform: str | None = None) -> Compiled | None:
    """The CPU kernels' library for a platform ("linux-aarch64"; None: this one); None where there is none."""
    known = {name: value for name, value in os.environ.items() if name != "STARLING_BUILD_KERNELS"}
    asked = known if platform is None else known | {"_PYTHON_HOST_PLATFORM": platform}
    output = subprocess.check_output([sys.executable, "-c", _ASK], cwd=ROOT, env=asked, text=True)
    found = [Compiled(**each) for each in json.loads(output)]
    return found[0] if found else None
