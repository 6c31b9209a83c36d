"""A bundle: the folder that `starling export` writes and the engine runs, and the typed view of its `bundle.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal, cast, get_args

from starling.engine.bundle.bounds import MOST_OF_A_PRODUCT, MOST_OF_ARCHITECTURE, check_sizes
from starling.engine.bundle.json_fields import JsonFields
from starling.engine.errors import BundleError, UserError
from starling.engine.names import DIALECTS, DTYPES, EMBEDDINGS, LOGITS, SCORES, TASKS, Dialect, DType, Task
from starling.engine.untrusted_files import FileReader, is_inside

Around = Literal["none", "residual", "gated"]
ReadAt = Literal["last", "last_but_pad", "before_first_pad", "mean"]
Side = Literal["left", "right"]

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
class Architecture:
    """Shape of the decoder.

    `sliding_window` is the checkpoint's own, in tokens (None: it has none); `max_positions` the longest sequence that
    the rotary tables cover; `parameters` counts tied weights once.
    """

    model_type: str
    class_name: str
    vocab_size: int
    hidden_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None
    max_positions: int
    parameters: int
    tied_embeddings: bool


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights, and in some schemes activations, are quantized.

    `block_size` weights along the input axis share a scale (None: all of an output channel); `accuracy_level` is
    MatMulNBits' own. `smoothing` is SmoothQuant's alpha; `kept` names projections that stay in the bundle's dtype.
    `bits_per_weight` is the mean over all weights in blocks, scales and zero points among them. `text`, `tokens`: what
    it was calibrated on, and how much of it.
    """

    scheme: str
    block_size: int | None
    symmetric: bool
    accuracy_level: int | None
    smoothing: float | None = None
    kept: tuple[str, ...] = ()
    bits_per_weight: float | None = None
    text: str | None = None
    tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of the graph. A `str` in `shape` is a symbolic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class Graph:
    """The ONNX file that the backend loads, and its inputs and outputs in order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class KVCache:
    """`bytes_per_token` counts keys and values of every layer for one position of one row."""

    dtype: str
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Weights:
    """`bytes_per_token` is what one decoded token reads: the embedding table counts only when lm_head shares it."""

    bytes: int
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids. Generation ends at any of `eos`."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of the bundle must be: its size in bytes and its SHA-256 in hex."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class CudaProduct:
    """A product with [n, k] weights in the graph for the CUDA kernels, whether its input is normed, and what follows.

    `around`: "none", "residual" (an addition) or "gated" (silu(gate) * value).
    """

    k: int
    n: int
    norm: bool
    around: Around


@dataclass(frozen=True, slots=True)
class CudaKernels:
    """The graph for the engine's own CUDA kernels, and every product in it once."""

    graph: str
    products: tuple[CudaProduct, ...]


@dataclass(frozen=True, slots=True)
class KeptReference:
    """A text, as token ids, whose logits by PyTorch are in `file`; `mean_kl` is the bundle's own at export, in nats.

    Of a bundle that scores or embeds the file has the numbers of its `compared_texts`, and `max_abs_diff` is how far
    the bundle's own were from them.
    """

    file: str
    tokens: tuple[int, ...]
    mean_kl: float | None
    max_abs_diff: float | None = None


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a model that scores or embeds reads a text: which token's hidden state, and what is done to a long text.

    `labels` are the names of the scores, in their order; none where the task is "embed". `read_at`: "last" token,
    "last_but_pad" (the last that is not `pad`: what is after it is not read), "before_first_pad" (the last before the
    first `pad`, where that is not the first token), or "mean" (over all tokens). `max_length`: a longer text loses
    tokens at its `truncation_side` (None: it is refused). `problem_type` is transformers' word for what scores mean.
    `long_from`: texts of more tokens are rotated by other factors, and so never run beside shorter ones (None: all
    alike). `normalize`: whether /v1/embeddings gives vectors of length 1 unless a request says otherwise.
    """

    labels: tuple[str, ...] = ()
    read_at: ReadAt = "last"
    pad: int | None = None
    truncation_side: Side = "right"
    max_length: int | None = None
    problem_type: str | None = None
    long_from: int | None = None
    normalize: bool = True


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
    kv, weights = top.inside("kv_cache"), top.inside("weights")
    graph, files = _graph(top.inside("graph")), _files(top.inside("files"))
    others = {field: top.optional(field, str) for field in ("reference_graph", "kernel_graph", "cuda_graph")}
    cuda_kernels = _cuda_kernels(top.inside("cuda_kernels")) if raw.get("cuda_kernels") is not None else None
    kept = _kept_reference(top.inside("verification")) if raw.get("verification") is not None else None
    named = {
        "graph.file": graph.file,
        **others,
        "cuda_kernels.graph": cuda_kernels and cuda_kernels.graph,
        "verification.file": kept and kept.file,
    }
    for field, file in named.items():
        if file is not None and file not in files:
            raise top.bad(field, file, "one of the files that bundle.json lists")
    architecture, tokens = _architecture(top.inside("architecture")), _tokens(top.inside("tokens"))
    cache = KVCache(kv.choice("dtype", ("float32", "float16", "bfloat16")), kv.get("bytes_per_token", int))
    check_sizes(top)
    task = cast(Task, top.choice("task", TASKS)) if raw.get("task") is not None else "generate"
    return Bundle(
        folder=folder,
        task=task,
        pooling=None if task == "generate" else _pooling(top.inside("pooling"), task),
        source=top.mapping("source"),
        architecture=architecture,
        dialect=cast(Dialect, top.choice("dialect", DIALECTS)),
        dtype=cast(DType, top.choice("dtype", DTYPES)),
        quantization=_quantization(top.inside("quantization")) if raw.get("quantization") is not None else None,
        graph=graph,
        **others,
        cuda_kernels=cuda_kernels,
        kv_cache=cache,
        weights=Weights(weights.get("bytes", int), weights.get("bytes_per_token", int)),
        tokens=tokens,
        generation=top.mapping("generation"),
        files=files,
        parity=top.mapping("parity") or None,
        verification=kept,
        raw=raw,
    )


def _architecture(fields: JsonFields) -> Architecture:
    counts = {name: fields.count(name, 1, most) for name, most in MOST_OF_ARCHITECTURE.items()}
    return Architecture(
        model_type=fields.get("model_type", str),
        class_name=fields.get("class", str),
        sliding_window=fields.optional("sliding_window", int),
        parameters=fields.get("parameters", int),
        tied_embeddings=fields.get("tied_embeddings", bool),
        **counts,
    )


def _pooling(fields: JsonFields, task: Task) -> Pooling:
    labels = fields.get("labels", list)
    if not all(isinstance(label, str) for label in labels) or (task == "score") != bool(labels):
        raise fields.bad("pooling.labels", labels, "a list with a name for each score")
    length = fields.optional("max_length", int)
    if length is not None and length < 2:  # a first token that is kept, and one of the text
        raise fields.bad("pooling.max_length", length, "a number from 2")
    read_at = cast(ReadAt, fields.choice("read_at", get_args(ReadAt)))
    if read_at == "mean" and task != "embed":
        raise fields.bad("pooling.read_at", read_at, "a token, since a score is read at one")
    return Pooling(
        tuple(labels),
        read_at,
        fields.optional("pad", int),
        cast(Side, fields.choice("truncation_side", get_args(Side))),
        length,
        fields.optional("problem_type", str),
        fields.optional("long_from", int),
        fields.optional("normalize", bool) is not False,
    )


def _quantization(fields: JsonFields) -> Quantization:
    calibration = fields.inside("calibration") if fields.value.get("calibration") is not None else None
    return Quantization(
        fields.get("scheme", str),
        fields.optional("block_size", int),
        fields.get("symmetric", bool),
        fields.optional("accuracy_level", int),
        fields.optional("smoothing", float),
        tuple(fields.optional("kept", list) or ()),
        fields.optional("bits_per_weight", float),
        calibration.get("text", str) if calibration is not None else None,
        calibration.get("tokens", int) if calibration is not None else None,
    )


def _cuda_kernels(fields: JsonFields) -> CudaKernels:
    return CudaKernels(fields.get("graph", str), tuple(_cuda_product(item) for item in fields.items("products")))


def _cuda_product(fields: JsonFields) -> CudaProduct:
    around = cast(Around, fields.choice("around", get_args(Around)))
    k, n = (fields.count(name, 1, MOST_OF_A_PRODUCT) for name in ("k", "n"))
    return CudaProduct(k, n, fields.get("norm", bool), around)


def _graph(fields: JsonFields) -> Graph:
    return Graph(
        fields.get("file", str),
        tuple(_tensor(item) for item in fields.items("inputs")),
        tuple(_tensor(item) for item in fields.items("outputs")),
    )


def _tensor(fields: JsonFields) -> TensorSpec:
    shape = fields.get("shape", list)
    if not all(isinstance(dimension, str) or (type(dimension) is int and dimension >= 0) for dimension in shape):
        raise fields.bad(f"{fields.prefix}shape", shape, "a list of numbers and names")
    return TensorSpec(fields.get("name", str), fields.get("dtype", str), tuple(shape))


def _tokens(fields: JsonFields) -> SpecialTokens:
    eos = fields.get("eos", list)
    if not all(type(token) is int and token >= 0 for token in eos):
        raise fields.bad("tokens.eos", eos, "a list of token ids")
    return SpecialTokens(fields.optional("bos", int), tuple(eos), fields.optional("pad", int))


def _kept_reference(fields: JsonFields) -> KeptReference:
    tokens = fields.get("tokens", list)
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise fields.bad("verification.tokens", tokens, "a list of token ids")
    return KeptReference(
        fields.get("file", str),
        tuple(tokens),
        fields.optional("mean_kl", float),
        fields.optional("max_abs_diff", float),
    )


def _files(fields: JsonFields) -> dict[str, FileRecord]:
    records = {}
    for name in fields.value:
        if not is_inside(name):
            raise fields.bad("files", name, "a name inside the bundle")
        entry = fields.inside(name)
        records[name] = FileRecord(entry.get("bytes", int), entry.get("sha256", str))
    return records
