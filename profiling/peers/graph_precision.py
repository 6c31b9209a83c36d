"""What precision a contender's graph really computes in, read from the graph itself rather than from its name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

_MATRIX_OPS = ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits")
_EMBEDDING_OPS = ("Gather", "GatherBlockQuantized")


def graph_precision(path: Path) -> dict[str, int] | None:
    """How many matrix products and embedding look-ups over weights the ONNX file has, by operator and weight format.

    For example {"MatMulNBits 8 bit block 32 symmetric accuracy_level 4": 121, "Gather float32": 1}. None where the
    onnx package is not installed: the comparison works without it.
    """
    try:
        import onnx
    except ImportError:
        return None
    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {weight.name: onnx.helper.tensor_dtype_to_np_dtype(weight.data_type).name for weight in graph.initializer}
    # A tied embedding may be looked up through a Transpose or Reshape of lm_head's weight.
    for node in graph.node:
        if node.op_type in ("Transpose", "Reshape", "Identity") and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
    return dict(Counter(label for node in graph.node if (label := _label(node, weights)) is not None))


def _label(node: Any, weights: dict[str, str]) -> str | None:
    if node.op_type not in _MATRIX_OPS + _EMBEDDING_OPS:
        return None
    weight = node.input[0 if node.op_type in _EMBEDDING_OPS else 1]
    if weight not in weights:
        return None
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if "bits" not in attributes and node.op_type != "GatherBlockQuantized":
        return f"{node.op_type} {weights[weight]}"
    label = f"{node.op_type} {attributes.get('bits', 4)} bit block {attributes['block_size']}"
    label += " asymmetric" if len(node.input) > 3 and node.input[3] else " symmetric"
    return label + (f" accuracy_level {attributes['accuracy_level']}" if "accuracy_level" in attributes else "")


def onnx_graph(folder: Path) -> Path | None:
    """The ONNX file that a model's folder is run by: named in bundle.json or genai_config.json, or its only one.

    None where there is none: the runtime has another form. (A bundle has both files; bundle.json names its own.)
    """
    for name, keys in (("bundle.json", ("graph", "file")), ("genai_config.json", ("model", "decoder", "filename"))):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_text(encoding="utf-8"))
            for key in keys:
                value = value[key]
            return folder / str(value)
    files = list(folder.glob("*.onnx"))
    return files[0] if len(files) == 1 else None
