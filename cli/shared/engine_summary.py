"""What `starling inspect` says of a bundle's TensorRT engines; their records are read, never the plans' content."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starling.cli.shared.output import human_bytes, human_seconds
from starling.engine.backends.tensorrt.engine_folder import engine_names, open_engine
from starling.engine.backends.tensorrt.plan_record import EngineRecord, Profile
from starling.engine.bundle.file_records import TensorSpec
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import PlanError
from starling.engine.names import INPUT_IDS


def engine_lines(bundle: Bundle, verified: bool) -> Iterator[str]:
    """A line for each engine: what it is, or why it cannot be used."""
    for name in engine_names(bundle.folder):
        try:
            record = open_engine(bundle, name, verify=verified)
        except PlanError as error:
            yield f"{name}: not usable: {error}"
        else:
            yield f"{name} ({human_bytes(record.plan.bytes)}): {_limits(record)}"


def engine_documents(bundle: Bundle, verified: bool) -> list[dict[str, Any]]:
    """For each engine its record, or its name and why it cannot be used."""
    documents: list[dict[str, Any]] = []
    for name in engine_names(bundle.folder):
        try:
            documents.append(engine_document(open_engine(bundle, name, verify=verified)))
        except PlanError as error:
            documents.append({"name": name, "error": str(error)})
    return documents


def engine_document(record: EngineRecord) -> dict[str, Any]:
    """The record as its file holds it, with its name and the plan's file."""
    return {"name": record.name, "file": str(record.plan_path), **record.to_json()}


def engine_rows(record: EngineRecord) -> list[tuple[str, str]]:
    """Everything of a record that a person would ask for."""
    cached = {name for pair in record.aliases for name in pair}
    return [
        ("engine", f"{record.plan_path} ({human_bytes(record.plan.bytes)})"),
        ("runtime", f"{record.runtime} {record.runtime_version}"),
        ("targets", ", ".join(record.targets)),
        ("precision", _precision(record)),
        ("limits", f"{record.max_batch} x {record.max_seq} positions, prefills of {record.max_prefill} tokens"),
        *((profile.name, _shapes(profile)) for profile in record.profiles),
        *(("input", _tensor(tensor)) for tensor in record.inputs if tensor.name not in cached),
        *(("output", _tensor(tensor)) for tensor in record.outputs if tensor.name not in cached),
        ("KV cache", _caches(record, cached)),
        ("layers", ", ".join(f"{count} {kind}" for kind, count in record.layers.items())),
        ("built", f"{record.created} in {human_seconds(record.build_seconds)}"),
        ("plan", f"SHA-256 {record.plan.sha256}"),
    ]


def _limits(record: EngineRecord) -> str:
    return (
        f"{record.runtime} {record.runtime_version} for {', '.join(record.targets)}, {_precision(record)}, up to "
        f"{record.max_batch} x {record.max_seq} positions, prefills of {record.max_prefill}"
    )


def _precision(record: EngineRecord) -> str:
    scheme = (record.quantization or {}).get("scheme")
    return record.dtype if scheme is None else f"{scheme}, {record.dtype}"


def _shapes(profile: Profile) -> str:
    """The range of the one input that says all: input_ids."""
    ids = profile.shapes[INPUT_IDS]
    rows, tokens = zip(ids.min, ids.opt, ids.max, strict=True)
    return f"batch {_range(rows)}, tokens {_range(tokens)}"


def _range(sizes: tuple[int, ...]) -> str:
    least, usual, most = sizes
    return str(least) if least == most else f"{least}..{most} (tuned for {usual})"


def _tensor(tensor: TensorSpec) -> str:
    return f"{tensor.name} {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _caches(record: EngineRecord, cached: set[str]) -> str:
    first = next(tensor for tensor in record.inputs if tensor.name in cached)
    shape = ", ".join(map(str, first.shape))
    return f"{len(record.aliases)} of {first.dtype} [{shape}], past and present at one address"
