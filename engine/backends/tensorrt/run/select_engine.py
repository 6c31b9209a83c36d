"""Which of a bundle's engines runs here: by runtime, GPU and size, or by name."""

from __future__ import annotations

from shlex import quote
from typing import NamedTuple

from starling.engine.backends.tensorrt.engine_folder import engine_names, open_engine, read_record
from starling.engine.backends.tensorrt.plan_record import EngineRecord
from starling.engine.backends.tensorrt.runtimes import Library
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import PlanError


class Wanted(NamedTuple):
    """What an engine must fit: the runtime that loads it, the GPU, positions and rows of the KV cache."""

    runtime: Library
    target: str
    max_seq: int
    max_batch: int


def select_engine(bundle: Bundle, wanted: Wanted, name: str | None = None) -> EngineRecord:
    """The engine called `name`, or the smallest one that fits, since a plan's size is what its KV cache takes.

    Raises PlanError where none fits, naming both sides, or where its files are not what its record says.
    """
    names = engine_names(bundle.folder) if name is None else (name,)
    if not names:
        raise PlanError(f"{bundle.folder} has no engines; make one with: starling build {quote(str(bundle.folder))}")
    records = [read_record(bundle.folder, each) for each in names]
    refusals = {record.name: _refusal(record, wanted) for record in records}
    fitting = [record for record in records if refusals[record.name] is None]
    if not fitting:
        raise _nearest([refusal for refusal in refusals.values() if refusal is not None])
    smallest = min(fitting, key=lambda record: (record.max_seq * record.max_batch, record.name))
    return open_engine(bundle, smallest.name)


def check_dialect(bundle: Bundle) -> None:
    """Raise PlanError for a bundle whose graph TensorRT would not run as it is meant."""
    if bundle.dialect != "tensorrt":
        raise PlanError(
            f"{bundle.folder} is a bundle of dialect {bundle.dialect}, which TensorRT does not run right: "
            "export the model with --dialect tensorrt"
        )


def runtime_of(bundle: Bundle, name: str | None) -> str | None:
    """The runtime that built the engine called `name`, or all engines; None where they are of several, or none is."""
    names = engine_names(bundle.folder) if name is None else (name,)
    runtimes = {read_record(bundle.folder, each).runtime for each in names}
    return runtimes.pop() if len(runtimes) == 1 else None


class _Refusal(NamedTuple):
    """Why an engine does not fit; the more `passed` before that, the nearer it was."""

    passed: int
    error: PlanError


def _refusal(record: EngineRecord, wanted: Wanted) -> _Refusal | None:
    try:
        record.require(wanted.runtime.name, wanted.runtime.version, wanted.target)
    except PlanError as error:
        return _Refusal(int(record.runtime == wanted.runtime.name), error)
    for passed, (what, has, needs, option) in enumerate(
        (
            ("rows", record.max_batch, wanted.max_batch, "--max-batch"),
            ("positions", record.max_seq, wanted.max_seq, "--max-seq"),
        ),
        start=2,
    ):
        if needs > has:
            remedy = f"ask for at most {has}, or: starling build … {option} {needs}"
            line = f"engine {record.name} holds {has} {what} of KV cache, {needs} are wanted: {remedy}"
            return _Refusal(passed, PlanError(line))
    return None


def _nearest(refusals: list[_Refusal]) -> PlanError:
    nearest = max(refusals, key=lambda refusal: refusal.passed).error
    others = len(refusals) - 1
    return nearest if not others else PlanError(f"{nearest} ({others} other engine(s) fit less)")
