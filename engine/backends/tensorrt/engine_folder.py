"""The engines of a bundle, `BUNDLE/engines/NAME.plan` with `NAME.json`: listed, read and checked without TensorRT."""

from __future__ import annotations

import hashlib
from pathlib import Path
from shlex import quote

from starling.engine.backends.tensorrt.plan_record import (
    FORMAT,
    FORMAT_VERSION,
    BundleDigests,
    EngineRecord,
    parse_record,
)
from starling.engine.bundle.json_fields import JsonFields
from starling.engine.bundle.manifest import ALWAYS_HASHED_BYTES, MOST_MANIFEST_BYTES, Bundle
from starling.engine.errors import PlanError
from starling.engine.untrusted_files import FileReader, is_file_name

FOLDER = "engines"
_REMEDY = "build it again: starling build … --force"
_FILES = FileReader(PlanError, _REMEDY)


def engine_names(bundle_folder: Path) -> tuple[str, ...]:
    """The names of a bundle folder's engines; a plan without its record, or a record without its plan, is none."""
    folder = bundle_folder / FOLDER
    records = (file.stem for file in folder.glob("*.json") if not file.name.startswith("."))
    return tuple(sorted(name for name in records if (folder / f"{name}.plan").is_file()))


def open_engine(bundle: Bundle, name: str, *, verify: bool = False) -> EngineRecord:
    """Read and check the record of the engine called `name`, and its plan's size and bundle.

    The plan's SHA-256 is checked up to 64 MiB; `verify` hashes larger ones too. Raises PlanError where there is no such
    engine, its plan is truncated or altered, it was built from another bundle, or its format is newer.
    """
    record = read_record(bundle.folder, name)
    _check_plan(record, hashed=verify or record.plan.bytes <= ALWAYS_HASHED_BYTES)
    _check_bundle(record, bundle)
    return record


def read_record(bundle_folder: Path, name: str) -> EngineRecord:
    """Read the record of the engine called `name`; its plan is not looked at. Raises PlanError."""
    folder = bundle_folder / FOLDER
    file = folder / f"{name}.json"
    if not is_file_name(name) or not file.is_file():
        names = engine_names(bundle_folder)
        remedy = f"make one with: starling build {quote(str(bundle_folder))}"
        known = f"has {', '.join(names)}" if names else f"has none; {remedy}"
        raise PlanError(f"no engine {name!r}: {bundle_folder} {known}")
    raw = _FILES.json(file, most=MOST_MANIFEST_BYTES)
    if raw.get("format") != FORMAT:
        raise PlanError(f'{file} does not say "format": "{FORMAT}"; {_REMEDY}')
    version = raw.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise PlanError(
            f"{file} is a record of format {version}, this Starling reads up to {FORMAT_VERSION}: "
            "upgrade Starling, or build the engine again"
        )
    return parse_record(folder, name, JsonFields(str(file), raw, error=PlanError, remedy=_REMEDY))


def _check_plan(record: EngineRecord, *, hashed: bool) -> None:
    path, expected = record.plan_path, record.plan
    if not path.is_file():
        raise PlanError(f"{path} is missing beside its record; {_REMEDY}")
    size = path.stat().st_size
    if size != expected.bytes:
        what = "truncated" if size < expected.bytes else "altered"
        raise PlanError(f"{path} is {what}: {size:,} bytes where its record says {expected.bytes:,}; {_REMEDY}")
    if not hashed:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected.sha256:
        raise PlanError(
            f"{path} is altered: SHA-256 {digest[:12]}… where its record says {expected.sha256[:12]}…; {_REMEDY}"
        )


def _check_bundle(record: EngineRecord, bundle: Bundle) -> None:
    ours, theirs = BundleDigests.of(bundle), record.built_from
    for what, here, there in (
        ("graph", ours.graph_sha256, theirs.graph_sha256),
        ("weights", ours.weights_sha256, theirs.weights_sha256),
        ("bundle.json", ours.bundle_json_sha256, theirs.bundle_json_sha256),
    ):
        if here != there:
            raise PlanError(
                f"engine {record.name} was built from another bundle: {what} {str(there)[:12]}…, "
                f"{bundle.folder} has {str(here)[:12]}…; {_REMEDY}"
            )
