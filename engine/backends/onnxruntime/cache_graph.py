"""The CPU kernels' graph with a KV cache of another type, which their attention takes by its inputs' types."""

from __future__ import annotations

from pathlib import Path

from starling.engine.errors import BackendError
from starling.engine.names import PAST, PRESENT
from starling.engine.onnx_bytes import GRAPH, INPUT, NODE, field, fields, rewrite

#: Of a GraphProto: inputs and outputs; of one of them: its name, and the way to its tensor's type of element.
_VALUES, _NAME, _TENSOR_TYPE, _ELEMENT = (11, 12), 1, ((2,), (1,)), 1
_DOMAIN, _OURS = 7, b"starling"


def graph_with_cache(file: Path, element_type: int) -> bytes:
    """The ONNX file with past keys and values, and those that it gives back, of `element_type` (TensorProto.DataType).

    Raises BackendError where another operator than the kernels' attention reads the cache, or the file is torn.
    """
    model = memoryview(file.read_bytes())
    try:
        if _others_read_the_cache(model):
            raise BackendError(f"{file}: its attention is not that of the CPU kernels, so its KV cache stays as it is")

        def retype(value: memoryview) -> bytes:
            name = next((bytes(text) for number, _, text in fields(value) if number == _NAME), b"")
            if not name.startswith((PAST.encode(), PRESENT.encode())):
                return bytes(value)
            return rewrite(value, _TENSOR_TYPE, lambda tensor: _with_element(tensor, element_type))

        return rewrite(model, ((GRAPH,), _VALUES), retype)
    except ValueError as error:
        raise BackendError(f"{file} is not an ONNX file ({error}); export the model again") from error


def _with_element(tensor: memoryview, element_type: int) -> bytes:
    return b"".join(
        field(number, element_type) if number == _ELEMENT else bytes(whole) for number, whole, _ in fields(tensor)
    )


def _others_read_the_cache(model: memoryview) -> bool:
    """Whether a node outside our domain has a past key or value as its input."""
    for in_model, _, graph in fields(model):
        if in_model != GRAPH:
            continue
        for number, _, node in fields(graph):
            if number != NODE:
                continue
            parts = [(part, bytes(content)) for part, _, content in fields(node) if part in (INPUT, _DOMAIN)]
            reads = any(part == INPUT and name.startswith(PAST.encode()) for part, name in parts)
            if reads and (_DOMAIN, _OURS) not in parts:
                return True
    return False
