"""The dialects of the tracer: how norm, rotary embedding and attention are written into the graph.

A dialect is one module that implements `dialect.Dialect`. Adding one touches that module and the table below.
"""

from starling.engine.errors import UserError
from starling.export.dialects.canonical import CanonicalDialect
from starling.export.dialects.dialect import AttentionCall, Dialect, Rotary, StepInput
from starling.export.dialects.ort import OrtDialect
from starling.export.dialects.tensorrt import TensorrtDialect

__all__ = ["DIALECTS", "AttentionCall", "Dialect", "Rotary", "StepInput", "get_dialect"]

DIALECTS: dict[str, type[Dialect]] = {
    "canonical": CanonicalDialect,
    "ort": OrtDialect,
    "tensorrt": TensorrtDialect,
}


def get_dialect(name: str) -> Dialect:
    """The dialect of that name.

    Raises:
        UserError: there is none.
    """
    if name not in DIALECTS:
        raise UserError(f"unknown dialect {name!r}; known are {', '.join(sorted(DIALECTS))}")
    return DIALECTS[name]()
