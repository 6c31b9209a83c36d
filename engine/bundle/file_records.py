"""What bundle.json says of the bundle's files: the graphs, their KV cache and weights, and what each file must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from starling.engine.bundle.json_fields import JsonFields
from starling.engine.untrusted_files import is_inside

Around = Literal["none", "residual", "gated"]

#: Rows or columns of a projection.
MOST_OF_A_PRODUCT = 2**26
#: Bytes of a number of the KV cache, by its type.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output of the graph. A `str` in `shape` is a symbolic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def _tensor(fields: JsonFields) -> TensorSpec:
    shape = fields.get("shape", list)
    if not all(isinstance(dimension, str) or (type(dimension) is int and dimension >= 0) for dimension in shape):
        raise fields.bad(f"{fields.prefix}shape", shape, "a list of numbers and names")
    return TensorSpec(fields.get("name", str), fields.get("dtype", str), tuple(shape))


@dataclass(frozen=True, slots=True)
class Graph:
    """The ONNX file that the backend loads, and its inputs and outputs in order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def read_graph(fields: JsonFields) -> Graph:
    return Graph(
        fields.get("file", str),
        tuple(_tensor(item) for item in fields.items("inputs")),
        tuple(_tensor(item) for item in fields.items("outputs")),
    )


@dataclass(frozen=True, slots=True)
class KVCache:
    """`bytes_per_token` counts keys and values of every layer for one position of one row."""

    dtype: str
    bytes_per_token: int


def read_kv_cache(fields: JsonFields) -> KVCache:
    return KVCache(fields.choice("dtype", tuple(ITEM_BYTES)), fields.get("bytes_per_token", int))


@dataclass(frozen=True, slots=True)
class Weights:
    """`bytes_per_token` is what one decoded token reads: the embedding table counts only when lm_head shares it."""

    bytes: int
    bytes_per_token: int


def read_weights(fields: JsonFields) -> Weights:
    return Weights(fields.get("bytes", int), fields.get("bytes_per_token", int))


@dataclass(frozen=True, slots=True)
class CudaProduct:
    """A product with [n, k] weights in the graph for the CUDA kernels, whether its input is normed, and what follows.

    `around`: "none", "residual" (an addition) or "gated" (silu(gate) * value).
    """

    k: int
    n: int
    norm: bool
    around: Around


def _cuda_product(fields: JsonFields) -> CudaProduct:
    around = cast(Around, fields.choice("around", get_args(Around)))
    k, n = (fields.count(name, 1, MOST_OF_A_PRODUCT) for name in ("k", "n"))
    return CudaProduct(k, n, fields.get("norm", bool), around)


@dataclass(frozen=True, slots=True)
class CudaKernels:
    """The graph for the engine's own CUDA kernels, and every product in it once."""

    graph: str
    products: tuple[CudaProduct, ...]


def read_cuda_kernels(fields: JsonFields) -> CudaKernels:
    return CudaKernels(fields.get("graph", str), tuple(_cuda_product(item) for item in fields.items("products")))


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


def read_kept_reference(fields: JsonFields) -> KeptReference:
    tokens = fields.get("tokens", list)
    if not all(type(token) is int and token >= 0 for token in tokens):
        raise fields.bad("verification.tokens", tokens, "a list of token ids")
    return KeptReference(
        fields.get("file", str),
        tuple(tokens),
        fields.optional("mean_kl", float),
        fields.optional("max_abs_diff", float),
    )


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file of the bundle must be: its size in bytes and its SHA-256 in hex."""

    bytes: int
    sha256: str


def read_files(fields: JsonFields) -> dict[str, FileRecord]:
    records = {}
    for name in fields.value:
        if not is_inside(name):
            raise fields.bad("files", name, "a name inside the bundle")
        entry = fields.inside(name)
        records[name] = FileRecord(entry.get("bytes", int), entry.get("sha256", str))
    return records
