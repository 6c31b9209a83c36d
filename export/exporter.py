"""From a checkpoint to a bundle: trace, plan, stream the weights, check against PyTorch, put in place."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from starling.engine.bundle import FORMAT, FORMAT_VERSION, Architecture
from starling.engine.errors import UserError
from starling.export.architecture import architecture_json
from starling.export.bundle_folder import check_space, file_entry, new_folder, write_json, write_tokenizer
from starling.export.checkpoint import Checkpoint
from starling.export.dialects import get_dialect
from starling.export.genai import GRAPH_FILE as GENAI_GRAPH_FILE
from starling.export.genai import genai_config, genai_graph
from starling.export.parity import Parity, available_memory, bundle_logits, compare, compared_positions, require_fp32
from starling.export.projections import write_projections
from starling.export.quantization import Quantization
from starling.export.reference import PASSAGE, cut, load_reference, reference_logits
from starling.export.tensorrt_reference import GRAPH_FILE as REFERENCE_FILE
from starling.export.tensorrt_reference import reference_graph
from starling.export.tracer import DTYPES, trace
from starling.export.weight_file import WrittenFile, bytes_per_token, planned_bytes, write_weights

GRAPH_FILE, WEIGHT_FILE = "model.onnx", "model.onnx.data"
CHECKED_TOKENS = 96
_CUT_LAYERS = 2
_SPARE_BYTES = 64 * 2**20  # graphs, tokenizer, JSON
_ORACLE_NOTE = (
    "compared by the reference graph on ONNX Runtime's CPU, which multiplies matrices in float32; "
    "TensorRT itself was not run"
)
_DTYPE_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class Progress(Protocol):
    """Told what an export is doing."""

    def phase(self, text: str) -> None:
        """A new phase begins."""

    def bytes(self, done: int, total: int) -> None:
        """So many bytes of the weights are written."""


class Silent:
    """Tells nobody."""

    def phase(self, text: str) -> None:
        """Nothing."""

    def bytes(self, done: int, total: int) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the bundle shall be. `check` None: compare with PyTorch unless the weights are random."""

    dialect: str = "ort"
    dtype: str = "fp32"
    quantization: Quantization | None = None
    check: bool | None = None
    force: bool = False

    def __post_init__(self) -> None:
        """Raises UserError where the settings do not go together."""
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}; known are {', '.join(DTYPES)}")
        if self.quantization is not None and not get_dialect(self.dialect).quantizable:
            raise UserError(f"dialect {self.dialect} is full precision only; use --dialect ort with --quant")


def export_bundle(
    checkpoint: Checkpoint, out: Path, options: ExportOptions, progress: Progress | None = None
) -> dict[str, Any]:
    """Export `checkpoint` into the bundle folder `out`, which appears whole or not at all; returns its bundle.json.

    Raises:
        UserError: `out` exists, or the settings or the model are not supported.
        StarlingError: the disk is full, or the graph disagrees with PyTorch.
    """
    progress = progress or Silent()
    with new_folder(out, force=options.force) as work:
        manifest = _write_model(checkpoint, work, options, progress)
        wanted = options.check if options.check is not None else checkpoint.kind != "random"
        if wanted:
            parity, note = _check(checkpoint, work, manifest, options, progress)
            manifest["parity"] = None if parity is None else parity.to_json()
            manifest["notes"] += [note] if note else []
            if parity is not None and options.dialect == "tensorrt":
                manifest["notes"].append(_ORACLE_NOTE)
            if parity is not None and options.dtype == "fp32" and options.quantization is None:
                require_fp32(parity)
            write_json(work / "bundle.json", manifest)
    return manifest


def _write_model(checkpoint: Checkpoint, folder: Path, options: ExportOptions, progress: Progress) -> dict[str, Any]:
    """Everything of a bundle but the check."""
    dialect = get_dialect(options.dialect)
    progress.phase(f"tracing {checkpoint.name}")
    traced = trace(checkpoint.config, dialect, options.dtype)
    graph, arch = traced.model, traced.architecture
    dialect.optimize(graph)
    write_projections(graph, options.quantization)
    total = planned_bytes(graph)
    check_space(folder, total + _SPARE_BYTES)
    progress.phase("writing weights")
    data = write_weights(graph, checkpoint.tensors, folder / WEIGHT_FILE, options.quantization, progress.bytes)
    _clean(graph)
    ir.save(graph, folder / GRAPH_FILE)
    if options.dialect == "ort":
        ir.save(genai_graph(graph), folder / GENAI_GRAPH_FILE)
        write_json(folder / "genai_config.json", genai_config(arch, checkpoint))
    elif options.dialect == "tensorrt":
        ir.save(reference_graph(graph), folder / REFERENCE_FILE)
    write_tokenizer(folder, checkpoint.tokenizer, checkpoint.generation)
    manifest = _manifest(checkpoint, arch, options, graph, total)
    manifest["files"] = _files(folder, {WEIGHT_FILE: data})
    write_json(folder / "bundle.json", manifest)
    return manifest


def _clean(graph: ir.Model) -> None:
    """Leave no trace of the tracer in the saved graph: no source paths, no scratch metadata."""
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in graph.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    graph.producer_name, graph.producer_version = "starling-llm", version("starling-llm")


def _manifest(
    checkpoint: Checkpoint, arch: Architecture, options: ExportOptions, graph: ir.Model, weight_bytes: int
) -> dict[str, Any]:
    width = DTYPES[options.dtype].itemsize
    tokens = checkpoint.tokenizer
    defaults = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "starling_version": version("starling-llm"),
        "source": {"kind": checkpoint.kind, "name": checkpoint.name},
        "architecture": architecture_json(arch),
        "dialect": options.dialect,
        "dtype": options.dtype,
        "quantization": None if options.quantization is None else options.quantization.to_json(),
        "graph": {
            "file": GRAPH_FILE,
            "inputs": _tensor_specs(graph.graph.inputs),
            "outputs": _tensor_specs(graph.graph.outputs),
        },
        "reference_graph": REFERENCE_FILE if options.dialect == "tensorrt" else None,
        "kv_cache": {
            "dtype": _DTYPE_NAMES[options.dtype],
            "bytes_per_token": 2 * arch.layers * arch.kv_heads * arch.head_dim * width,
        },
        "weights": {"bytes": weight_bytes, "bytes_per_token": bytes_per_token(graph)},
        "tokens": {"bos": tokens.bos, "eos": list(tokens.eos), "pad": tokens.pad},
        "generation": {key: checkpoint.generation.get(key) for key in defaults},
        "files": {},
        "versions": {name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
        "parity": None,
        "notes": list(tokens.notes),
    }


def _tensor_specs(values: Iterable[ir.Value]) -> list[dict[str, Any]]:
    specs = []
    for value in values:
        assert value.dtype is not None
        assert value.shape is not None
        shape = [d if isinstance(d, int) else d.value for d in value.shape]
        names = {"FLOAT": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16"}
        specs.append(
            {"name": value.name, "dtype": names.get(value.dtype.name, value.dtype.name.lower()), "shape": shape}
        )
    return specs


def _files(folder: Path, known: dict[str, WrittenFile]) -> dict[str, Any]:
    """Size and digest of every file; those of `known` were taken while they were written."""
    entries = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name != "bundle.json"):
        name = file.relative_to(folder).as_posix()
        written = known.get(name)
        entries[name] = file_entry(file) if written is None else {"bytes": written.bytes, "sha256": written.sha256}
    return entries


def _check(
    checkpoint: Checkpoint, folder: Path, manifest: dict[str, Any], options: ExportOptions, progress: Progress
) -> tuple[Parity | None, str | None]:
    """Compare with PyTorch: the whole model where memory allows, else its first layers; the note says why not all."""
    if options.dtype == "bf16":
        return None, "not compared with PyTorch: ONNX Runtime's CPU provider does not run bfloat16"
    layers = manifest["architecture"]["layers"]
    if _memory_needed(manifest, layers) <= available_memory():
        progress.phase("comparing with PyTorch")
        return _compare(checkpoint, folder, layers), None
    if _memory_needed(manifest, _CUT_LAYERS) > available_memory():
        return None, "not compared with PyTorch: too little memory even for the first layers"
    progress.phase(f"comparing the first {_CUT_LAYERS} layers with PyTorch")
    shorter = replace(checkpoint, config=cut(checkpoint.config, _CUT_LAYERS))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as temporary:
        _write_model(shorter, Path(temporary), options, Silent())
        parity = _compare(shorter, Path(temporary), _CUT_LAYERS)
    return parity, f"compared with PyTorch on the first {_CUT_LAYERS} of {layers} layers: the whole needs more memory"


def _memory_needed(manifest: dict[str, Any], layers: int) -> int:
    """A generous estimate in bytes: PyTorch's float32 weights, the runtime's copy of them, and slack."""
    arch = manifest["architecture"]
    ends = arch["vocab_size"] * arch["hidden_size"] * (1 if arch["tied_embeddings"] else 2)
    per_layer = (arch["parameters"] - ends) // arch["layers"]
    return int(4 * (ends + layers * per_layer) * 2.5)


def _compare(checkpoint: Checkpoint, folder: Path, layers: int) -> Parity:
    ids = _passage_ids(checkpoint)
    positions = compared_positions(len(ids) - 1)
    model = load_reference(checkpoint.config, checkpoint.tensors)
    reference = reference_logits(model, ids[:-1])[positions].numpy()
    del model  # the bundle is loaded next: the two need not fit at once
    ours = bundle_logits(folder, ids[:-1])
    return compare(np.asarray(reference), ours, [ids[p + 1] for p in positions], layers)


def _passage_ids(checkpoint: Checkpoint) -> list[int]:
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json).encode(PASSAGE).ids
    longest = min(CHECKED_TOKENS, checkpoint.config.max_position_embeddings) + 1
    return ids[:longest]
