"""From a checkpoint to a bundle: trace, plan, stream the weights, check against PyTorch, put in place."""

import tempfile
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from starling import __version__
from starling.engine.backends.onnxruntime.onnxruntime_backend import check_runs_on_cpu
from starling.engine.bundle.manifest import FIRST_VERSION, FORMAT, FORMAT_VERSION, Bundle
from starling.engine.bundle.model_records import Architecture, Pooling
from starling.engine.errors import BackendError, UserError
from starling.engine.names import ARRAY_DTYPES, DTYPES, SCHEMES_OF
from starling.engine.progress import Progress, Silent
from starling.export.bundle_folder import check_space, file_entry, new_bundle_folder, write_json, write_tokenizer
from starling.export.check.bundle_quality import CUT_LAYERS, fits, keep_logits, load_compared, measure, require_quality
from starling.export.check.parity import Parity, require_fp32
from starling.export.check.pooled_quality import PooledParity, keep_pooled, measure_pooled, require_fp32_pooled
from starling.export.check.torch_reference import cut
from starling.export.checkpoints.checkpoint import Checkpoint, Shapes, TensorSource
from starling.export.dialects import DIALECTS
from starling.export.dialects.dialect import Companion
from starling.export.graphs.projections import write_projections
from starling.export.quantization.block_plan import BlockPlan, plan_blocks
from starling.export.quantization.blocks import BlockQuantization
from starling.export.quantization.calibration_choice import Calibration
from starling.export.quantization.prepare_blocks import (
    CalibratedBlocks,
    calibrated_blocks,
    wants_calibration,
    with_mean_bits,
)
from starling.export.quantization.prepare_qdq import prepare
from starling.export.quantization.qdq_settings import QdqQuantization, check_scheme
from starling.export.quantization.stored_blocks import StoredBlocks, stored_blocks
from starling.export.tracing.architecture import LEAST_POSITIONS, architecture_json
from starling.export.tracing.tracer import TORCH_DTYPES, Trace, trace
from starling.export.weights.weight_file import WrittenFile, write_weights
from starling.export.weights.weight_plan import bits_per_weight, bytes_per_token, planned_bytes
from starling.export.weights.weight_source import WeightSource

GRAPH_FILE, WEIGHT_FILE = "model.onnx", "model.onnx.data"
_SPARE_BYTES = 64 * 2**20  # graphs, tokenizer, JSON
_NO_BF16 = "logits were not compared with PyTorch's: nothing here runs bfloat16 on the CPU"


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """What the bundle shall be. `check` None: compare with PyTorch unless the weights are random.

    `max_positions` is the longest sequence that it takes: see `positions_of`.
    `all_logits`: the graph for onnxruntime-genai gives those of every token, as lm-eval's back ends want them.
    `weights` False leaves them out: the weight file has its size and takes no space. The graphs are the same.
    """

    dialect: str = "ort"
    dtype: str = "fp32"
    quantization: BlockQuantization | QdqQuantization | None = None
    calibration: Calibration = field(default_factory=Calibration)
    check: bool | None = None
    accept_quality: bool = False
    force: bool = False
    weights: bool = True
    max_positions: int | None = None
    all_logits: bool = False

    def __post_init__(self) -> None:
        """Raises UserError where the settings do not go together."""
        if self.dtype not in DTYPES:
            raise UserError(f"unknown dtype {self.dtype!r}; known are {', '.join(DTYPES)}")
        if self.dialect not in DIALECTS:
            raise UserError(f"unknown dialect {self.dialect!r}; known are {', '.join(sorted(DIALECTS))}")
        if self.all_logits and self.dialect != "ort":
            raise UserError(f"all_logits is for --dialect ort: {self.dialect} has no graph for onnxruntime-genai")
        if self.quantization is not None:
            check_quantization(self.quantization, self.dialect)


def check_quantization(how: BlockQuantization | QdqQuantization, dialect: str) -> None:
    """Raise UserError where the dialect has no operators for this quantization."""
    if how.scheme not in SCHEMES_OF[dialect]:
        check_scheme(how.scheme, dialect)  # for its words
    if isinstance(how, QdqQuantization) != (dialect == "tensorrt"):
        raise UserError(f"dialect {dialect} does not take the settings of a {type(how).__name__}")


def export_bundle(
    checkpoint: Checkpoint, out: Path, options: ExportOptions, progress: Progress | None = None
) -> dict[str, Any]:
    """Export `checkpoint` into the bundle folder `out`, which appears whole or not at all; returns its bundle.json.

    Raises:
        UserError: `out` exists, or the settings or the model are not supported.
        StarlingError: the disk is full, or the graph disagrees with PyTorch.
    """
    if checkpoint.task != "generate":
        _check_pooled(options.quantization)
    progress = progress or Silent()
    with new_bundle_folder(out, force=options.force) as work:
        manifest, arch = _write_model(checkpoint, work, options, progress)
        wanted = options.check if options.check is not None else checkpoint.kind != "random"
        if wanted and options.weights:
            parity, verification, note = _check(checkpoint, arch, work, options, progress)
            manifest["parity"] = None if parity is None else parity.to_json()
            if verification is not None:
                manifest["verification"] = verification
                manifest["files"][verification["file"]] = file_entry(work / verification["file"])
            manifest["notes"] += [note] if note else []
            if parity is not None and (comparison_note := DIALECTS[options.dialect]().comparison_note):
                manifest["notes"].append(comparison_note)
            if parity is not None and options.dtype == "fp32" and options.quantization is None:
                require_fp32_pooled(parity) if isinstance(parity, PooledParity) else require_fp32(parity)
            if isinstance(parity, Parity) and note is None and not options.accept_quality:
                require_quality(parity, options.quantization)
            write_json(work / "bundle.json", manifest)
    return manifest


def _check_pooled(how: BlockQuantization | QdqQuantization | None) -> None:
    """Raise UserError for a quantization that is judged by next tokens, which a model that scores has none of."""
    if isinstance(how, QdqQuantization) and (how.quantizes_activations or how.head):
        what = f"--quant {how.scheme}" if how.quantizes_activations else "--quantize-head"
        raise UserError(f"{what} is for models that generate text: take --quant int8 or int4 for this one")


def _write_model(
    checkpoint: Checkpoint, folder: Path, options: ExportOptions, progress: Progress
) -> tuple[dict[str, Any], Architecture]:
    """Everything of a bundle but the check; its bundle.json and its architecture."""
    dialect = DIALECTS[options.dialect]()
    progress.phase(f"tracing {checkpoint.name}")
    traced = trace(checkpoint.config, dialect, options.dtype, options.max_positions, checkpoint.task)
    graph, arch = traced.model, traced.architecture
    dialect.optimize(graph)
    write_tokenizer(folder, checkpoint.tokenizer, checkpoint.generation)
    how, prepared = options.quantization, None
    tensors: TensorSource = checkpoint.tensors if options.weights else Shapes(checkpoint.tensors)
    if isinstance(how, QdqQuantization):
        prepared = prepare(graph, arch, checkpoint, folder, how, options.calibration, progress)
        tensors = prepared.weights.tensors
    plan = None
    if isinstance(how, BlockQuantization):
        plan = plan_blocks(graph.graph, how)
        if options.weights:
            plan = with_mean_bits(graph, arch, checkpoint, folder, plan, options.calibration, progress)
    write_projections(graph, prepared.weights.plan if prepared else plan)
    total = planned_bytes(graph)
    check_space(folder, (total if options.weights else 0) + _SPARE_BYTES)
    stored = _stored(graph, checkpoint, plan, options)
    with _calibrated(graph, arch, checkpoint, folder, plan, stored, options, progress) as calibrated:
        progress.phase("writing weights")
        source = WeightSource(tensors, plan, calibrated.store, stored)
        data = write_weights(graph, source, folder / WEIGHT_FILE, progress.bytes)
    _clean(graph)
    ir.save(graph, folder / GRAPH_FILE)
    companions = _write_companions(
        dialect.companions(graph, None if plan is None else plan.how, all_logits=options.all_logits), folder
    )
    for name, document in dialect.settings(arch, checkpoint).items():
        write_json(folder / name, document)
    manifest = _manifest(checkpoint, arch, options, graph, total) | companions
    manifest["pooling"] = _pooling(checkpoint.pooling, traced)
    manifest["notes"] += traced.notes
    if prepared is not None:
        manifest["quantization"] = prepared.report
        manifest["notes"] += prepared.notes
    if plan is not None:
        manifest["quantization"] |= {
            "bits_per_weight": bits_per_weight(graph, tensors),
            "calibration": calibrated.report,
            "eight_bits": sorted(plan.eight_bits),
            "as_stored": [] if stored is None else sorted(stored.grids),
        }
        manifest["notes"] += (() if stored is None else stored.notes) + calibrated.notes
    manifest["files"] = _files(folder, {WEIGHT_FILE: data})
    write_json(folder / "bundle.json", manifest)
    return manifest, arch


def _stored(
    graph: ir.Model, checkpoint: Checkpoint, plan: BlockPlan | None, options: ExportOptions
) -> StoredBlocks | None:
    """Which of the weights in blocks are taken as the checkpoint has them; None where nothing of it is quantized."""
    if plan is None or checkpoint.packed is None or not options.weights:
        return None
    return stored_blocks(graph.graph, checkpoint.packed, plan)


def _calibrated(
    graph: ir.Model,
    arch: Architecture,
    checkpoint: Checkpoint,
    folder: Path,
    plan: BlockPlan | None,
    stored: StoredBlocks | None,
    options: ExportOptions,
    progress: Progress,
) -> AbstractContextManager[CalibratedBlocks]:
    """What calibration makes of the weights in blocks; nothing where there is none."""
    if (
        plan is None
        or plan.how.bits != 4  # more are rounded
        or not options.weights
        or not wants_calibration(graph.graph, checkpoint, plan, stored, options.calibration)
    ):
        return nullcontext(CalibratedBlocks(None, None, ()))
    return calibrated_blocks(graph, arch, checkpoint, folder, plan, stored, options.calibration, progress)


def _write_companions(companions: list[Companion], folder: Path) -> dict[str, Any]:
    """Write the further graphs over the same weights; what bundle.json says of them."""
    said: dict[str, Any] = dict.fromkeys(("reference_graph", "kernel_graph", "cuda_graph", "cuda_kernels"))
    for companion in companions:
        ir.save(companion.model, folder / companion.file)
        if companion.field is not None:
            said[companion.field] = companion.record
    return said


def _clean(graph: ir.Model) -> None:
    """Leave no trace of the tracer in the saved graph: no source paths, no scratch metadata."""
    graph.metadata_props.clear()
    graph.graph.metadata_props.clear()
    for node in graph.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    graph.producer_name, graph.producer_version = "starling-llm", __version__


def _manifest(
    checkpoint: Checkpoint, arch: Architecture, options: ExportOptions, graph: ir.Model, weight_bytes: int
) -> dict[str, Any]:
    width = TORCH_DTYPES[options.dtype].itemsize
    tokens = checkpoint.tokenizer
    defaults = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
    return {
        "format": FORMAT,
        "format_version": FIRST_VERSION if checkpoint.task == "generate" else FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "starling_version": __version__,
        "source": {"kind": checkpoint.kind, "name": checkpoint.name},
        "task": checkpoint.task,
        "pooling": None,
        "architecture": architecture_json(arch),
        "dialect": options.dialect,
        "dtype": options.dtype,
        "quantization": None if options.quantization is None else options.quantization.to_json(),
        "graph": {
            "file": GRAPH_FILE,
            "inputs": _tensor_specs(graph.graph.inputs),
            "outputs": _tensor_specs(graph.graph.outputs),
        },
        "kv_cache": {
            "dtype": ARRAY_DTYPES[options.dtype],
            "bytes_per_token": 2 * arch.layers * arch.kv_heads * arch.head_dim * width,
        },
        "weights": {"bytes": weight_bytes, "bytes_per_token": bytes_per_token(graph)},
        "tokens": {"bos": tokens.bos, "eos": list(tokens.eos), "pad": tokens.pad},
        "generation": {key: checkpoint.generation.get(key) for key in defaults},
        "files": {},
        "versions": {name: version(name) for name in ("torch", "transformers", "onnx", "onnxscript")},
        "parity": None,
        "verification": None,
        "notes": [*_cut_positions(checkpoint, arch), *checkpoint.notes, *tokens.notes],
    }


def _pooling(pooling: Pooling | None, traced: Trace) -> dict[str, Any] | None:
    if pooling is None:
        return None
    length = pooling.max_length and min(pooling.max_length, traced.architecture.max_positions)
    found = asdict(replace(pooling, max_length=length, long_from=traced.long_from))
    return found | {"labels": list(pooling.labels)}


def _cut_positions(checkpoint: Checkpoint, arch: Architecture) -> list[str]:
    most = checkpoint.config.max_position_embeddings
    if arch.max_positions == most:
        return []
    return [f"takes sequences of up to {arch.max_positions:,} tokens, of the model's {most:,} (--max-positions)"]


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
    checkpoint: Checkpoint, arch: Architecture, folder: Path, options: ExportOptions, progress: Progress
) -> tuple[Parity | PooledParity | None, dict[str, Any] | None, str | None]:
    """Compare with PyTorch: the whole model where memory allows, else its first layers; the note says why not all.

    Between the two is what bundle.json says of the numbers that are kept, which are those of a whole model alone.
    """
    if arch.max_positions < LEAST_POSITIONS:
        return None, None, f"not compared with PyTorch: it takes fewer than {LEAST_POSITIONS} tokens"
    whole = fits(arch, arch.layers)
    if not whole and not fits(arch, CUT_LAYERS):
        return None, None, "not compared with PyTorch: too little memory even for the first layers"
    compared = checkpoint if whole else replace(checkpoint, config=cut(checkpoint.config, CUT_LAYERS))
    progress.phase("comparing with PyTorch" if whole else f"comparing the first {CUT_LAYERS} layers with PyTorch")
    if options.dtype == "bf16" and not _runs_on_cpu(folder):
        model = load_compared(compared)
        keep = keep_logits if checkpoint.task == "generate" else keep_pooled
        return None, keep(model, folder) if whole else None, _NO_BF16
    if whole:
        return *_measure(checkpoint, folder), None
    with tempfile.TemporaryDirectory(dir=folder) as temporary:  # goes with the working folder where this is killed
        _write_model(compared, Path(temporary), options, Silent())
        parity, _ = _measure(compared, Path(temporary))
    return (
        parity,
        None,
        f"compared with PyTorch on the first {CUT_LAYERS} of {arch.layers} layers: the whole needs more memory",
    )


def _runs_on_cpu(folder: Path) -> bool:
    try:
        check_runs_on_cpu(Bundle.open(folder))
    except BackendError:
        return False
    return True


def _measure(checkpoint: Checkpoint, folder: Path) -> tuple[Parity | PooledParity, dict[str, Any]]:
    return measure(checkpoint, folder) if checkpoint.task == "generate" else measure_pooled(checkpoint, folder)
