"""The bytes of an ONNX model with one matrix product, for measuring what the machine's kernels reach.

The onnx package belongs to the extra `export`, so the few messages are written by the protobuf wire format
(https://protobuf.dev/programming-guides/encoding/); field numbers are those of onnx.proto3.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: TensorProto.DataType of NumPy's types.
DATA_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "float16": 10}

_IR_VERSION, _OPSET = 8, 17


def product_graph(operator: str, rows: int, weights: NDArray[np.generic], input_type: str, output_type: str) -> bytes:
    """A ModelProto: `y` [rows, n] = `operator`(`x` [rows, k], weights [k, n])."""
    tensor = (
        b"".join(_integer(1, size) for size in weights.shape)
        + _integer(2, DATA_TYPES[weights.dtype.name])
        + _text(8, "w")
        + _message(9, weights.tobytes())
    )
    node = _text(1, "x") + _text(1, "w") + _text(2, "y") + _text(3, "product") + _text(4, operator)
    graph = (
        _message(1, node)
        + _text(2, "graph")
        + _message(5, tensor)
        + _message(11, _value("x", input_type, (rows, weights.shape[0])))
        + _message(12, _value("y", output_type, (rows, weights.shape[1])))
    )
    return _integer(1, _IR_VERSION) + _message(7, graph) + _message(8, _text(1, "") + _integer(2, _OPSET))


def _value(name: str, kind: str, shape: tuple[int, ...]) -> bytes:
    dimensions = b"".join(_message(1, _integer(1, size)) for size in shape)
    tensor = _integer(1, DATA_TYPES[kind]) + _message(2, dimensions)
    return _text(1, name) + _message(2, _message(1, tensor))


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _message(field, content.encode())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
