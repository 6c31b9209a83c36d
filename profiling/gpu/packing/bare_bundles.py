"""Bundles whose weights are left out, small enough to carry; the card's machine draws random ones in their place."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from starling.export.checkpoints.random_checkpoint import open_random
from starling.export.exporter import WEIGHT_FILE, ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization
from starling.profiling.gpu.stages import LAYOUT, SHARED


@dataclass(frozen=True, slots=True)
class BareBundle:
    """A bundle of the kit: a built-in configuration and how it is exported."""

    name: str
    model: str
    dtype: str
    scheme: str | None = None

    @property
    def options(self) -> ExportOptions:
        how = None if self.scheme is None else BlockQuantization(self.scheme)
        return ExportOptions(dtype=self.dtype, quantization=how, check=False, weights=False)


BUNDLES = (
    BareBundle("tiny-fp16", "starling-tiny", "fp16"),
    BareBundle("tiny-int8-bf16", "starling-tiny", "bf16", "int8"),
    BareBundle("tiny-int8-fp16", "starling-tiny", "fp16", "int8"),
    BareBundle("tiny-int4-fp16", "starling-tiny", "fp16", "int4"),
    BareBundle("7b-fp16", "starling-7b", "fp16"),
    BareBundle("7b-int8-fp16", "starling-7b", "fp16", "int8"),
)


def write_bare_bundles(folder: Path, wanted: Iterable[BareBundle], say: Callable[[str], None]) -> None:
    """Export each of them to a folder of its name, without the weights, with LAYOUT."""
    for bundle in wanted:
        say(f"exporting {bundle.name}")
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            whole = Path(temporary) / bundle.name
            manifest = export_bundle(open_random(bundle.model), whole, bundle.options)
            _keep(whole, folder / bundle.name, folder / SHARED, manifest)


def _keep(whole: Path, target: Path, shared: Path, manifest: dict[str, Any]) -> None:
    """Move a bundle's files but the weights; what is no graph and the same everywhere goes to `shared`."""
    layout = weight_layout(whole, manifest)
    (whole / WEIGHT_FILE).unlink()
    for name in manifest["files"]:
        file = whole / name
        if not file.exists():
            continue
        common = shared / name
        is_graph = file.suffix == ".onnx"
        place = target / name if is_graph or (common.exists() and not _same(file, common)) else common
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(file, place)
    target.mkdir(exist_ok=True)
    shutil.move(whole / "bundle.json", target / "bundle.json")
    (target / LAYOUT).write_text(json.dumps(layout), encoding="utf-8")


def _same(file: Path, other: Path) -> bool:
    return file.read_bytes() == other.read_bytes()


def weight_layout(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """Size of the weight file, what a token on CUDA reads of it, and name, offset, length, shape and type of each
    weight in it."""
    weights = _weights(folder / manifest["graph"]["file"])
    cuda = manifest["cuda_graph"]
    read = [weight for weight in _weights(folder / cuda) if not _is_looked_up(weight["name"])] if cuda else []
    return {
        "bytes": manifest["files"][WEIGHT_FILE]["bytes"],
        "bytes_per_token": sum(weight["length"] for weight in read),
        "weights": weights,
    }


def _weights(graph: Path) -> list[dict[str, Any]]:
    model = onnx.load(graph, load_external_data=False)
    return [_entry(tensor) for tensor in model.graph.initializer if tensor.external_data]


def _entry(tensor: onnx.TensorProto) -> dict[str, Any]:
    place = {entry.key: entry.value for entry in tensor.external_data}
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
    return {
        "name": tensor.name,
        "offset": int(place["offset"]),
        "length": int(place["length"]),
        "shape": list(tensor.dims),
        "dtype": kind,
    }


def _is_looked_up(name: str) -> bool:
    """Whether a token reads a row of it, not all."""
    return name.startswith(("rotary_", "model.embed_tokens."))
