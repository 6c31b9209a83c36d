"""A bundle: the folder that `starling export` writes and the engine runs, and the typed view of its `bundle.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, cast

from starling.engine.bundle.file_records import (
    ITEM_BYTES,
    CudaKernels,
    FileRecord,
    Graph,
    KeptReference,
    KVCache,
    Weights,
    read_cuda_kernels,
    read_files,
    read_graph,
    read_kept_reference,
    read_kv_cache,
    read_weights,
)
from starling.engine.bundle.json_fields import JsonFields
from starling.engine.bundle.model_records import (
    Architecture,
    Pooling,
    Quantization,
    SpecialTokens,
    read_architecture,
    read_pooling,
    read_quantization,
    read_tokens,
)
from starling.engine.errors import BundleError, UserError, did_you_mean
from starling.engine.names import (
    ARRAY_DTYPES,
    DIALECTS,
    DTYPES,
    EMBEDDINGS,
    LOGITS,
    PAST,
    SCORES,
    TASKS,
    Dialect,
    DType,
    Task,
)
from starling.engine.untrusted_files import FileReader

FORMAT = "starling-bundle"
#: The newest format; one that generates text is written as FIRST_VERSION, which every Starling reads.
FORMAT_VERSION, FIRST_VERSION = 2, 1
#: The output of the graph that answers the task.
OUTPUT_OF: dict[Task, str] = {"generate": LOGITS, "score": SCORES, "embed": EMBEDDINGS}
#: Reads of a bundle's files.
FILES = FileReader(BundleError, "export the model again")
#: The largest bundle.json; one of 126 layers has 90 kB.
MOST_MANIFEST_BYTES = 16 * 2**20
#: Files up to this size are hashed at every open: the graph and the tokenizer cost milliseconds, the weights seconds.
ALWAYS_HASHED_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Bundle:
    """Typed view of a bundle folder. `raw` is bundle.json as it was read; `parity` what the export measured.

    `reference_graph` is a second file with the same nodes, in which operators of the dialect's own have a meaning;
    `kernel_graph` one over the same weights for `starling.engine.kernels`, `cuda_graph` one for decode steps that stay
    on a GPU, `cuda_kernels` the same for kernels of `starling.engine.kernels.cuda`. None: there is none.
    `verification` is for `starling.engine.verification`, or `starling.engine.pooling.pooled_verification`. `pooling` is
    None where the `task` is "generate".
    """

    folder: Path
    task: Task
    pooling: Pooling | None
    source: Mapping[str, str]
    architecture: Architecture
    dialect: Dialect
    dtype: DType
    quantization: Quantization | None
    graph: Graph
    reference_graph: str | None
    kernel_graph: str | None
    cuda_graph: str | None
    cuda_kernels: CudaKernels | None
    kv_cache: KVCache
    weights: Weights
    tokens: SpecialTokens
    generation: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    parity: Mapping[str, Any] | None
    verification: KeptReference | None
    raw: Mapping[str, Any]

    @staticmethod
    def open(folder: str | Path, *, verify: bool = False) -> Bundle:
        """Read and check the bundle in `folder`.

        Every file's size is checked, and the SHA-256 of files up to 64 MiB; `verify` hashes the larger ones too.
        Raises BundleError when the folder is no bundle, a file is missing, truncated or altered, or the format newer.
        """
        path = Path(folder)
        bundle = _parse(path, _read_json(path))
        FILES.check_folder(path, path.rglob("*"))
        for name, record in bundle.files.items():
            _check_file(path / name, record, hashed=verify or record.bytes <= ALWAYS_HASHED_BYTES)
        return bundle

    @property
    def output_width(self) -> int:
        """Numbers that the graph gives for a position: logits, scores or the hidden state."""
        widths = {"generate": self.architecture.vocab_size, "embed": self.architecture.hidden_size}
        return len(self.pooling.labels) if self.task == "score" and self.pooling else widths[self.task]

    def require(self, *tasks: Task) -> Bundle:
        """The bundle itself; UserError where its task is none of these: the line says what it is for."""
        if self.task not in tasks:
            raise UserError(f"{self.folder} {_MADE_FOR[self.task]}", field="bundle")
        return self

    def with_kv_dtype(self, dtype: DType | None) -> Bundle:
        """The bundle with a KV cache of `dtype`, one of DTYPES; None leaves it as it is.

        Keys and values are rounded to the type when they are written. The attention of the CPU kernels reads each of
        them, and computes as before: no other backend takes such a bundle. Raises UserError for another name, and for a
        bundle without a graph for the CPU kernels.
        """
        if dtype is None:
            return self
        if dtype not in DTYPES:
            problem = f"kv_dtype {dtype!r} is unknown{did_you_mean(dtype, DTYPES)}: one of {', '.join(DTYPES)}"
            raise UserError(problem, field="kv_dtype")
        cache, kind = self.kv_cache, ARRAY_DTYPES[dtype]
        if kind == cache.dtype:
            return self
        self.require("generate")
        if self.kernel_graph is None:
            raise UserError(
                f"{self.folder}: its KV cache stays {cache.dtype}: only the CPU kernels read another type, and "
                "this bundle has no graph for them",
                field="kv_dtype",
            )
        numbers = cache.bytes_per_token // ITEM_BYTES[cache.dtype]
        return replace(self, kv_cache=KVCache(kind, numbers * ITEM_BYTES[kind]))

    @property
    def replaced_kv_dtype(self) -> str | None:
        """The type of the KV cache in the graphs, as NumPy calls it, where `with_kv_dtype` gave it another one."""
        exported = next((spec.dtype for spec in self.graph.inputs if spec.name.startswith(PAST)), self.kv_cache.dtype)
        return None if exported == self.kv_cache.dtype else exported

    @property
    def graph_path(self) -> Path:
        """The ONNX file that the dialect's own runtime loads."""
        return self.folder / self.graph.file

    @property
    def reference_path(self) -> Path:
        """The ONNX file that any reader of the standard can run."""
        return self.folder / (self.reference_graph or self.graph.file)


_MADE_FOR: dict[Task, str] = {
    "generate": "generates text, it neither scores nor embeds texts: export a model that scores, or with --task embed",
    "score": "scores texts, it generates none: use starling score, or starling serve and its /classify",
    "embed": "embeds texts, it generates none: use starling score, or starling serve and its /v1/embeddings",
}


def _read_json(folder: Path) -> dict[str, Any]:
    if not folder.exists():
        raise BundleError(f"{folder}: no such folder; make a bundle with: starling export MODEL {quote(str(folder))}")
    if not (folder / "bundle.json").is_file():
        raise BundleError(f"{folder} is not a bundle (no bundle.json); make one with: starling export MODEL OUT")
    raw = FILES.json(folder / "bundle.json", most=MOST_MANIFEST_BYTES)
    if raw.get("format") != FORMAT:
        raise BundleError(f'{folder}/bundle.json does not say "format": "{FORMAT}"; export the model again')
    version = raw.get("format_version")
    if type(version) is not int or version < 1:
        raise BundleError(f"{folder}/bundle.json has format_version {version!r}, not a number; export the model again")
    if version > FORMAT_VERSION:
        raise BundleError(
            f"{folder} is a bundle of format {version}, this Starling reads up to {FORMAT_VERSION}: upgrade Starling"
        )
    return raw


def _check_file(path: Path, record: FileRecord, *, hashed: bool) -> None:
    if not path.is_file():
        raise BundleError(f"{path} is missing from the bundle; copy the bundle again or export it again")
    size = path.stat().st_size
    if size != record.bytes:
        what = "truncated" if size < record.bytes else "altered"
        raise BundleError(
            f"{path} is {what}: {size:,} bytes where bundle.json says {record.bytes:,}; "
            "copy the bundle again or export it again"
        )
    if hashed:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != record.sha256:
            raise BundleError(
                f"{path} is altered: SHA-256 {digest[:12]}… where bundle.json says {record.sha256[:12]}…; "
                "copy the bundle again or export it again"
            )


def _parse(folder: Path, raw: dict[str, Any]) -> Bundle:
    top = JsonFields(f"{folder}/bundle.json", raw)
    task = cast(Task, top.choice("task", TASKS)) if raw.get("task") is not None else "generate"
    bundle = Bundle(
        folder=folder,
        task=task,
        pooling=None if task == "generate" else read_pooling(top.inside("pooling"), task),
        source=top.mapping("source"),
        architecture=read_architecture(top.inside("architecture")),
        dialect=cast(Dialect, top.choice("dialect", DIALECTS)),
        dtype=cast(DType, top.choice("dtype", DTYPES)),
        quantization=top.part("quantization", read_quantization),
        graph=read_graph(top.inside("graph")),
        reference_graph=top.optional("reference_graph", str),
        kernel_graph=top.optional("kernel_graph", str),
        cuda_graph=top.optional("cuda_graph", str),
        cuda_kernels=top.part("cuda_kernels", read_cuda_kernels),
        kv_cache=read_kv_cache(top.inside("kv_cache")),
        weights=read_weights(top.inside("weights")),
        tokens=read_tokens(top.inside("tokens")),
        generation=top.mapping("generation"),
        files=read_files(top.inside("files")),
        parity=top.mapping("parity") or None,
        verification=top.part("verification", read_kept_reference),
        raw=raw,
    )
    _check_named_files(top, bundle)
    _check_widths(top, bundle)
    _check_cache(top, bundle)
    return bundle


def _check_named_files(top: JsonFields, bundle: Bundle) -> None:
    named = {
        "graph.file": bundle.graph.file,
        "reference_graph": bundle.reference_graph,
        "kernel_graph": bundle.kernel_graph,
        "cuda_graph": bundle.cuda_graph,
        "cuda_kernels.graph": bundle.cuda_kernels and bundle.cuda_kernels.graph,
        "verification.file": bundle.verification and bundle.verification.file,
    }
    for field, file in named.items():
        if file is not None and file not in bundle.files:
            raise top.bad(field, file, "one of the files that bundle.json lists")


def _check_widths(top: JsonFields, bundle: Bundle) -> None:
    """The graph's outputs are as wide as the architecture says, and special tokens are of its vocabulary."""
    vocab, labels = bundle.architecture.vocab_size, bundle.pooling.labels if bundle.pooling is not None else ()
    widths = {LOGITS: vocab, EMBEDDINGS: bundle.architecture.hidden_size, SCORES: len(labels)}
    for spec in bundle.graph.outputs:
        width = widths.get(spec.name)
        if width is not None and spec.shape[-1:] != (width,):
            raise top.bad(f"graph.outputs: {spec.name}", [*spec.shape], f"vectors of {width}, as the rest says")
    for token in (bundle.tokens.bos, bundle.tokens.pad, *bundle.tokens.eos):
        if token is not None and token >= vocab:
            raise top.bad("tokens", token, f"an id below {vocab}")


def _check_cache(top: JsonFields, bundle: Bundle) -> None:
    """The graph's past inputs are the cache that the architecture asks for, before memory is taken for it."""
    arch, cache = bundle.architecture, bundle.kv_cache
    past = [spec for spec in bundle.graph.inputs if spec.name.startswith(PAST)]
    wanted = {f"{PAST}{layer}.{side}" for layer in range(arch.layers) for side in ("key", "value")}
    if {spec.name for spec in past} != wanted:
        raise top.bad("architecture.layers", arch.layers, f"that of the graph, which has {len(past)} past inputs")
    for spec in past:
        if len(spec.shape) != 4 or (spec.shape[1], spec.shape[3]) != (arch.kv_heads, arch.head_dim):
            sizes = f"[batch, {arch.kv_heads}, cache, {arch.head_dim}], as the architecture says"
            raise top.bad(f"graph.inputs: {spec.name}", [*spec.shape], sizes)
        if spec.dtype != cache.dtype:
            raise top.bad(f"graph.inputs: {spec.name}", spec.dtype, f"{cache.dtype}, as kv_cache says")
    expected = len(wanted) * arch.kv_heads * arch.head_dim * ITEM_BYTES[cache.dtype]
    if cache.bytes_per_token != expected:
        raise top.bad("kv_cache.bytes_per_token", cache.bytes_per_token, f"{expected}, as the architecture says")
