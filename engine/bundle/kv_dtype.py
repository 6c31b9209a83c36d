"""A bundle whose KV cache is to have another type than the one that it was exported with."""

from __future__ import annotations

from dataclasses import replace

from starling.engine.bundle.bounds import ITEM_BYTES
from starling.engine.bundle.manifest import Bundle, KVCache
from starling.engine.errors import UserError, did_you_mean
from starling.engine.names import ARRAY_DTYPES, DTYPES, PAST, DType


def with_kv_dtype(bundle: Bundle, dtype: DType | None) -> Bundle:
    """The bundle with a KV cache of `dtype`, one of DTYPES; None leaves it as it is.

    Keys and values are rounded to the type when they are written.
    The attention of the CPU kernels reads each of them, and computes as before: no other backend takes such a bundle.
    Raises UserError for another name, and for a bundle without a graph for the CPU kernels.
    """
    if dtype is None:
        return bundle
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"kv_dtype {dtype!r} is unknown{did_you_mean(dtype, DTYPES)}: one of {known}", field="kv_dtype")
    kind = ARRAY_DTYPES[dtype]
    if kind == bundle.kv_cache.dtype:
        return bundle
    bundle.require("generate")
    if bundle.kernel_graph is None:
        raise UserError(
            f"{bundle.folder}: its KV cache stays {bundle.kv_cache.dtype}: only the CPU kernels read another type, and "
            "this bundle has no graph for them",
            field="kv_dtype",
        )
    numbers = bundle.kv_cache.bytes_per_token // ITEM_BYTES[bundle.kv_cache.dtype]
    return replace(bundle, kv_cache=KVCache(kind, numbers * ITEM_BYTES[kind]))


def exported_kv_dtype(bundle: Bundle) -> str:
    """The type of the KV cache in the bundle's graphs, as NumPy calls it."""
    return next(spec.dtype for spec in bundle.graph.inputs if spec.name.startswith(PAST))


def has_other_kv_dtype(bundle: Bundle) -> bool:
    """Whether `with_kv_dtype` gave the bundle another type than its graphs have."""
    return bundle.task == "generate" and bundle.kv_cache.dtype != exported_kv_dtype(bundle)
