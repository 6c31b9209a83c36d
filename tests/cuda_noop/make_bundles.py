"""Bundles for this room, with holes in place of their weights: a model of 14 GB takes no space.

Run with what exports need: `make test-cuda-noop` does.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

from starling.engine.bundle.manifest import ALWAYS_HASHED_BYTES
from starling.profiling.gpu.packing.bare_bundles import BUNDLES, BareBundle, write_bare_bundles
from starling.profiling.gpu.stages import LAYOUT, SHARED

WEIGHT_FILE = "model.onnx.data"


def make(out: Path) -> None:
    """The kit's bundles and one of fp32, in place of what is there."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    wanted = [*BUNDLES, BareBundle("tiny-fp32", "starling-tiny", "fp32")]
    with tempfile.TemporaryDirectory(dir=out.parent) as temporary:
        bare, draft = Path(temporary) / "bare", Path(temporary) / "bundles"
        bare.mkdir()
        write_bare_bundles(bare, wanted, print)
        for bundle in wanted:
            fill_with_holes(bare, bundle.name, draft / bundle.name)
        draft.rename(out)


def fill_with_holes(bare: Path, name: str, target: Path) -> None:
    """A bundle whose weights are zero."""
    for source in (bare / SHARED, bare / name):
        shutil.copytree(source, target, dirs_exist_ok=True)
    size = json.loads((target / LAYOUT).read_text(encoding="utf-8"))["bytes"]
    weights = target / WEIGHT_FILE
    with weights.open("wb") as file:
        file.truncate(size)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest() if size <= ALWAYS_HASHED_BYTES else "not taken"
    manifest = json.loads((target / "bundle.json").read_text(encoding="utf-8"))
    manifest["files"][WEIGHT_FILE] = {"bytes": size, "sha256": digest}
    manifest["files"] = {file: entry for file, entry in manifest["files"].items() if (target / file).is_file()}
    (target / "bundle.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
