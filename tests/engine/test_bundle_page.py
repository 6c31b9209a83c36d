"""docs/bundle-format.md has every field that the exporter and the builder write, and no other."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from document_blocks import ROOT

from starling.engine.backends.tensorrt import plan_record
from starling.engine.backends.tensorrt.plan_record import BundleDigests, EngineRecord, Profile, ShapeRange
from starling.engine.bundle.file_records import FileRecord, TensorSpec
from starling.engine.bundle.manifest import FORMAT_VERSION
from starling.export.check.sample_texts import CALIBRATION
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.scoring_models import for_task
from starling.export.dialects import DIALECTS
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization
from starling.export.quantization.calibration_choice import Calibration
from starling.export.quantization.qdq_settings import QdqQuantization

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
TENSOR = TensorSpec("input_ids", "int64", ("batch", 1))
RECORD = EngineRecord(
    **{"folder": Path(), "name": "a", "runtime": "tensorrt", "runtime_version": "1", "targets": ("sm89",)},
    **{"dtype": "fp16", "quantization": None, "max_batch": 1, "max_prefill": 1, "max_seq": 1},
    profiles=(Profile("decode", {"input_ids": ShapeRange((1,), (1,), (1,))}),),
    inputs=(TENSOR,),
    outputs=(TENSOR,),
    aliases=(("past", "present"),),
    layers={"gemm": 1},
    build_seconds=1.0,
    built_from=BundleDigests("a", "b", None),
    plan=FileRecord(1, "c"),
    created="now",
)


def table(heading: str) -> list[list[str]]:
    """The cells of the table's rows under a heading."""
    section = re.split(r"\n##", PAGE.partition(f"\n{heading}\n")[2])[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def names(heading: str) -> list[str]:
    """What the first column has in backticks."""
    return [name for row in table(heading) for name in re.findall(r"`([^`]+)`", row[0])]


def fields(value: Any, named: frozenset[str], path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of every field: `a.b`, `a[].b`; the keys of objects in `named` (path: NAME) are any names."""
    if isinstance(value, dict) and path not in ("", *named):
        yield path, value
    if isinstance(value, dict):
        for key, item in value.items():
            below = f"{path}.{'*' if path in named else key}".removeprefix(".")
            yield from fields(item, named, below)
    elif isinstance(value, list) and value and isinstance(value[0], dict | list):
        for item in value:
            yield from fields(item, named, f"{path}[]")
    else:
        yield path, value


def written(documents: list[dict[str, Any]], named: frozenset[str]) -> dict[str, list[Any]]:
    """Values of every field that one of the documents has."""
    found: dict[str, list[Any]] = {}
    for document in documents:
        for path, value in fields(document, named):
            found.setdefault(path, []).append(value)
    return found


@pytest.fixture(scope="module")
def manifests(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Checkpoint, tiny_bundle: Path
) -> list[dict[str, Any]]:
    """bundle.json of bundles that together have every field."""
    folder = tmp_path_factory.mktemp("page")
    int8 = ExportOptions(dtype="fp16", quantization=BlockQuantization("int8"), check=False)
    w8a8 = ExportOptions(dialect="tensorrt", dtype="fp16", quantization=QdqQuantization("w8a8", keep=()), check=False)
    int4 = ExportOptions(quantization=BlockQuantization("int4"), calibration=Calibration(CALIBRATION, 256), check=False)
    wanted = {"int8": int8, "w8a8": w8a8, "int4": int4}
    made = [export_bundle(tiny_checkpoint, folder / name, how) for name, how in wanted.items()]
    return [json.loads((tiny_bundle / "bundle.json").read_text(encoding="utf-8")), *made]


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Checkpoint) -> dict[str, Any]:
    """bundle.json of one that embeds, which has fields of its own, and no choice in its graph."""
    out = tmp_path_factory.mktemp("page") / "embedding"
    return export_bundle(for_task(tiny_checkpoint, "embed"), out, ExportOptions(check=True))


#: JSON's types by the page's words.
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (float, int),
    "true": (bool,),
    "false": (bool,),
    "null": (type(None),),
    "object": (dict,),
    "list": (list,),
}


def test_the_page_has_the_fields_of_bundle_json_with_their_types(
    manifests: list[dict[str, Any]], embedding: dict[str, Any]
) -> None:
    rows = {row[0].strip("`").replace("NAME", "*"): row for row in table("## bundle.json")}
    found = written([*manifests, embedding], frozenset({"files"}))
    parents = {path for path in found if isinstance(found[path][0], dict)} - set(rows)
    assert set(rows) == set(found) - parents
    for path, row in rows.items():
        words = re.findall(r"\w+", row[1].partition(" of ")[0])
        kinds = {kind for word in words if word in TYPES for kind in TYPES[word]}
        assert {type(value) for value in found[path]} <= kinds, f"{path}: {row[1]}"


def test_the_page_has_the_fields_of_an_engines_record() -> None:
    found = written([json.loads(json.dumps(RECORD.to_json()))], frozenset({"layers", "profiles[].shapes"}))
    parents = {path for path, values in found.items() if isinstance(values[0], dict)}
    listed = [re.sub(r"\b(INPUT|KIND)\b", "*", name) for name in names("## engines/NAME.json")]
    assert set(listed) == set(found) - parents
    assert (plan_record.FORMAT_VERSION, FORMAT_VERSION) == (1, 2)


def test_the_page_has_every_file(manifests: list[dict[str, Any]]) -> None:
    listed = set(names("## Files"))
    found = {re.sub("/.*", "/NAME.jinja", file) for manifest in manifests for file in manifest["files"]}
    assert found == listed - {"bundle.json", "engines/NAME.plan", "engines/NAME.json"}


def test_the_page_has_the_inputs_and_outputs_of_every_dialect(
    manifests: list[dict[str, Any]], tmp_path: Path, tiny_checkpoint: Checkpoint
) -> None:
    canonical = export_bundle(tiny_checkpoint, tmp_path / "out", ExportOptions(dialect="canonical", check=False))
    listed: dict[str, set[str]] = {dialect: set() for dialect in DIALECTS}
    for row in table("### Inputs and outputs of the graphs"):
        for dialect in DIALECTS if row[1] == "all" else re.findall(r"`(\w+)`", row[1]):
            listed[dialect] |= set(re.findall(r"`([^`]+)`", row[0]))
    for manifest in (*manifests, canonical):
        tensors = [*manifest["graph"]["inputs"], *manifest["graph"]["outputs"]]
        assert listed[manifest["dialect"]] == {re.sub(r"\.\d+\.", ".LAYER.", tensor["name"]) for tensor in tensors}
