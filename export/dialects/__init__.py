"""The dialects of the tracer: how norm, rotary embedding and attention are written into the graph.

A dialect is one module that implements `dialect.Dialect`. Adding one touches that module and the table below.
"""

from starling.export.dialects.canonical import CanonicalDialect
from starling.export.dialects.dialect import AttentionCall, Dialect, Rotary, StepInput
from starling.export.dialects.ort import OrtDialect
from starling.export.dialects.tensorrt import TensorrtDialect

__all__ = ["DIALECTS", "AttentionCall", "Dialect", "Rotary", "StepInput"]

DIALECTS: dict[str, type[Dialect]] = {
    "canonical": CanonicalDialect,
    "ort": OrtDialect,
    "tensorrt": TensorrtDialect,
}
