"""The record beside an engine plan: what it was built from, by and for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling.engine.bundle.file_records import FileRecord, TensorSpec
from starling.engine.bundle.json_fields import MOST, JsonFields
from starling.engine.bundle.manifest import Bundle
from starling.engine.bundle.model_records import MOST_OF_ARCHITECTURE
from starling.engine.errors import PlanError

FORMAT = "starling-engine-plan"
FORMAT_VERSION = 1
_MOST_ROWS, _MOST_POSITIONS = 2**16, MOST_OF_ARCHITECTURE["max_positions"]


@dataclass(frozen=True, slots=True)
class ShapeRange:
    """The shapes that a profile allows an input, and the one that it is tuned for."""

    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Profile:
    """An optimization profile, "prefill" or "decode"; its index in the plan is its place in the record."""

    name: str
    shapes: Mapping[str, ShapeRange]


@dataclass(frozen=True, slots=True)
class BundleDigests:
    """SHA-256 of what a plan was built from; `weights_sha256` None where the graph holds its own weights."""

    bundle_json_sha256: str
    graph_sha256: str
    weights_sha256: str | None

    @staticmethod
    def of(bundle: Bundle) -> BundleDigests:
        """The digests of an opened bundle."""
        graph = bundle.graph.file
        weights = bundle.files.get(f"{graph}.data")
        manifest = (bundle.folder / "bundle.json").read_bytes()
        return BundleDigests(
            bundle_json_sha256=hashlib.sha256(manifest).hexdigest(),
            graph_sha256=bundle.files[graph].sha256,
            weights_sha256=None if weights is None else weights.sha256,
        )


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What a plan is. `aliases` pairs each past input with the present output that must lie at the same address.

    `runtime` is "tensorrt-rtx" or "tensorrt"; a dynamic dimension of `inputs` and `outputs` is named. `max_batch` rows,
    `max_prefill` tokens of one prefill and `max_seq` positions of the KV cache were asked for.
    """

    folder: Path
    name: str
    runtime: str
    runtime_version: str
    targets: tuple[str, ...]
    dtype: str
    quantization: Mapping[str, Any] | None
    max_batch: int
    max_prefill: int
    max_seq: int
    profiles: tuple[Profile, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    aliases: tuple[tuple[str, str], ...]
    layers: Mapping[str, int]
    build_seconds: float
    built_from: BundleDigests
    plan: FileRecord
    created: str

    @property
    def plan_path(self) -> Path:
        """The plan's file."""
        return self.folder / f"{self.name}.plan"

    def require(self, runtime: str, version: str, target: str) -> None:
        """Raise PlanError unless the plan is one of this runtime and version, and runs on a GPU of this target."""
        if (self.runtime, self.runtime_version) != (runtime, version):
            raise PlanError(
                f"engine {self.name} was built by {self.runtime} {self.runtime_version}, here is {runtime} {version}: "
                "build it again, or install that version"
            )
        if target not in self.targets:
            raise PlanError(
                f"engine {self.name} was built for {', '.join(self.targets)}, this GPU is {target}: "
                f"starling build … --target {target}"
            )

    def to_json(self) -> dict[str, Any]:
        """The record as its file holds it."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "runtime": {"name": self.runtime, "version": self.runtime_version},
            "targets": list(self.targets),
            "precision": {"dtype": self.dtype, "quantization": self.quantization},
            "max_batch": self.max_batch,
            "max_prefill": self.max_prefill,
            "max_seq": self.max_seq,
            "profiles": [
                {
                    "name": profile.name,
                    "shapes": {
                        name: {"min": list(shapes.min), "opt": list(shapes.opt), "max": list(shapes.max)}
                        for name, shapes in profile.shapes.items()
                    },
                }
                for profile in self.profiles
            ],
            "inputs": [_tensor_json(tensor) for tensor in self.inputs],
            "outputs": [_tensor_json(tensor) for tensor in self.outputs],
            "aliases": [list(pair) for pair in self.aliases],
            "layers": dict(self.layers),
            "build_seconds": self.build_seconds,
            "bundle": {
                "bundle_json_sha256": self.built_from.bundle_json_sha256,
                "graph_sha256": self.built_from.graph_sha256,
                "weights_sha256": self.built_from.weights_sha256,
            },
            "plan": {"bytes": self.plan.bytes, "sha256": self.plan.sha256},
            "created": self.created,
        }


def parse_record(folder: Path, name: str, top: JsonFields) -> EngineRecord:
    """The record that `EngineRecord.to_json` wrote. Raises what `top` raises for a wrong field."""
    runtime, precision, digests, plan = (top.inside(key) for key in ("runtime", "precision", "bundle", "plan"))
    return EngineRecord(
        folder=folder,
        name=name,
        runtime=runtime.get("name", str),
        runtime_version=runtime.get("version", str),
        targets=tuple(top.get("targets", list)),
        dtype=precision.get("dtype", str),
        quantization=precision.mapping("quantization") or None,
        max_batch=top.count("max_batch", 1, _MOST_ROWS),
        max_prefill=top.count("max_prefill", 1, _MOST_POSITIONS),
        max_seq=top.count("max_seq", 1, _MOST_POSITIONS),
        profiles=tuple(_profile(item) for item in top.items("profiles")),
        inputs=tuple(_tensor(item) for item in top.items("inputs")),
        outputs=tuple(_tensor(item) for item in top.items("outputs")),
        aliases=tuple(_pair(top, item) for item in top.get("aliases", list)),
        layers=top.mapping("layers"),
        build_seconds=float(top.get("build_seconds", float)),
        built_from=BundleDigests(
            digests.get("bundle_json_sha256", str),
            digests.get("graph_sha256", str),
            digests.optional("weights_sha256", str),
        ),
        plan=FileRecord(plan.get("bytes", int), plan.get("sha256", str)),
        created=top.get("created", str),
    )


def _profile(fields: JsonFields) -> Profile:
    shapes = fields.inside("shapes")
    return Profile(fields.get("name", str), {name: _range(shapes.inside(name)) for name in shapes.value})


def _range(fields: JsonFields) -> ShapeRange:
    sizes = [fields.get(key, list) for key in ("min", "opt", "max")]
    if not all(type(size) is int and 0 <= size <= MOST for shape in sizes for size in shape):
        raise fields.bad(fields.prefix.rstrip("."), sizes, "shapes of whole numbers")
    return ShapeRange(*map(tuple, sizes))


def _tensor(fields: JsonFields) -> TensorSpec:
    return TensorSpec(fields.get("name", str), fields.get("dtype", str), tuple(fields.get("shape", list)))


def _tensor_json(tensor: TensorSpec) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}


def _pair(top: JsonFields, item: object) -> tuple[str, str]:
    if not isinstance(item, list) or len(item) != 2:
        raise top.bad("aliases", item, "a pair of names")
    return str(item[0]), str(item[1])
