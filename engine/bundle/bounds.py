"""What the numbers of a bundle.json may be, alone and beside each other, before memory is taken by them."""

from __future__ import annotations

from typing import Any

from starling.engine.bundle.json_fields import JsonFields
from starling.engine.names import EMBEDDINGS, LOGITS, PAST, SCORES

#: The greatest sizes of a decoder: some way above every one that there is.
MOST_OF_ARCHITECTURE = {
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "layers": 2**12,
    "query_heads": 2**14,
    "kv_heads": 2**14,
    "head_dim": 2**14,
    "max_positions": 2**30,
}
#: Rows or columns of a projection.
MOST_OF_A_PRODUCT = 2**26
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def check_sizes(top: JsonFields) -> None:
    """Raise what `top` raises where the architecture is not the graph's, or a special token not of the vocabulary.

    Of a bundle.json whose fields have their types.
    """
    arch, cache, graph, tokens = (top.value[name] for name in ("architecture", "kv_cache", "graph", "tokens"))
    vocab = arch["vocab_size"]
    _check_cache(top, arch, cache, {spec["name"]: spec for spec in graph["inputs"] if spec["name"].startswith(PAST)})
    labels = (top.value.get("pooling") or {}).get("labels") or []
    widths = {LOGITS: vocab, EMBEDDINGS: arch["hidden_size"], SCORES: len(labels)}
    for spec in graph["outputs"]:
        width = widths.get(spec["name"])
        if width is not None and spec["shape"][-1:] != [width]:
            raise top.bad(f"graph.outputs: {spec['name']}", spec["shape"], f"vectors of {width}, as the rest says")
    for token in (tokens.get("bos"), tokens.get("pad"), *tokens["eos"]):
        if token is not None and token >= vocab:
            raise top.bad("tokens", token, f"an id below {vocab}")


def _check_cache(top: JsonFields, arch: dict[str, Any], cache: dict[str, Any], past: dict[str, dict[str, Any]]) -> None:
    heads, head_dim, dtype = arch["kv_heads"], arch["head_dim"], cache["dtype"]
    wanted = {f"{PAST}{layer}.{side}" for layer in range(arch["layers"]) for side in ("key", "value")}
    if past.keys() != wanted:
        raise top.bad("architecture.layers", arch["layers"], f"that of the graph, which has {len(past)} past inputs")
    for name, spec in past.items():
        if len(spec["shape"]) != 4 or (spec["shape"][1], spec["shape"][3]) != (heads, head_dim):
            sizes = f"[batch, {heads}, cache, {head_dim}], as the architecture says"
            raise top.bad(f"graph.inputs: {name}", spec["shape"], sizes)
        if spec["dtype"] != dtype:
            raise top.bad(f"graph.inputs: {name}", spec["dtype"], f"{dtype}, as kv_cache says")
    expected = len(wanted) * heads * head_dim * ITEM_BYTES[dtype]
    if cache["bytes_per_token"] != expected:
        raise top.bad("kv_cache.bytes_per_token", cache["bytes_per_token"], f"{expected}, as the architecture says")
