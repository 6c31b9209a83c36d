"""The program that makes one model of a peer: `python maker.py MODULE CHECKPOINT OUT OPTIONS`, OPTIONS being JSON.

CHECKPOINT is a Hugging Face folder, OUT an empty folder. Runs as a plain script in the peer's own environment.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any, Protocol


class Maker(Protocol):
    """What the module of a peer offers."""

    def make(self, checkpoint: Path, out: Path, options: dict[str, Any]) -> None:
        """Write the model into `out` as the peer's worker opens it."""
        ...


def main() -> None:
    module, checkpoint, out, options = sys.argv[1:]
    maker: Maker = importlib.import_module(module)
    maker.make(Path(checkpoint), Path(out), json.loads(options))


if __name__ == "__main__":
    main()
