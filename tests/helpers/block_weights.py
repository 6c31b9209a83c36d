"""The weights that a bundle of dialect ort has in blocks, read from its graph and its file by numpy alone."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper


def block_weights(bundle: Path) -> dict[str, NDArray[np.float32]]:
    """The values [rows, columns] of each weight; one that is packed of q and k is named `…q_proj+k_proj.weight`."""
    graph = onnx.load(bundle / "model.onnx").graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    casts = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    found = {}
    for node in graph.node:
        if node.op_type not in ("MatMulNBits", "GatherBlockQuantized"):
            continue
        data, _, scales, zeros = [*node.input[:4]] if node.op_type == "GatherBlockQuantized" else _inputs(node)
        settings = {each.name: each.i for each in node.attribute}
        rows = len(arrays[data])
        scale = arrays[casts.get(scales, scales)].astype(np.float32)
        codes = _codes(arrays[data].reshape(rows, -1), settings["bits"]).reshape(*scale.shape, settings["block_size"])
        zero = _codes(arrays[zeros].reshape(rows, -1), settings["bits"])[:, : scale.shape[1]]
        values = (codes - zero[..., None]) * scale[..., None]
        found[data.rpartition("_q")[0]] = values.reshape(rows, -1)[:, : settings.get("K")]
    return found


def _inputs(node: onnx.NodeProto) -> tuple[str, str, str, str]:
    return node.input[1], node.input[0], node.input[2], node.input[3]


def _codes(stored: NDArray[np.uint8], bits: int) -> NDArray[np.float32]:
    if bits == 8:
        return stored.astype(np.float32)
    return np.stack((stored & 15, stored >> 4), axis=-1).reshape(len(stored), -1).astype(np.float32)


def names_in(packed: str) -> list[str]:
    """The names of the tensors that are packed into the weight of that name, in the order of their rows."""
    first, *parts = packed.split("+")
    if not parts:
        return [packed]
    stem, _, one = first.rpartition(".")
    *others, last = parts
    return [f"{stem}.{name}.weight" for name in (one, *others, last.removesuffix(".weight"))]
