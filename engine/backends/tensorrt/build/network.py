"""A bundle's graph as a TensorRT network: read, given its static cache length, parsed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling.engine.backends.tensorrt.build.graph_edits import drop_draws, drop_window_masks, set_dimension
from starling.engine.backends.tensorrt.runtimes import Library, inputs_of, layers_of, outputs_of
from starling.engine.bundle.file_records import TensorSpec
from starling.engine.errors import BuildError
from starling.engine.onnx_bytes import external_files
from starling.engine.untrusted_files import is_file_name

_DTYPES = {"HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32"}


@dataclass(frozen=True, slots=True)
class ParsedNetwork:
    """A network and what must live as long as it: the parser owns its weights."""

    builder: Any
    network: Any
    parser: Any

    def inputs(self, written: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The network's inputs; dynamic dimensions are called as in the bundle's specification `written`."""
        return _specs(inputs_of(self.network), written)

    def outputs(self, written: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
        """The network's outputs, likewise."""
        return _specs(outputs_of(self.network), written)


def parse_graph(
    library: Library, graph: Path, *, max_seq: int, window: int | None, greedy: bool = False
) -> ParsedNetwork:
    """Parse the ONNX file `graph`, with its weights beside it, for a KV cache of `max_seq` positions.

    A sliding window of `window` positions that no sequence of the cache outgrows is left out, and so is, with `greedy`,
    all that draws tokens. Raises BuildError where TensorRT cannot parse it.
    """
    try:
        content = graph.read_bytes()
        # ONNX Runtime refuses such a path itself.
        if strange := sorted(name for name in external_files(content) if not is_file_name(name)):
            raise BuildError(f"{graph} has weights in {strange[0]!r}, not in a file beside it; export the model again")
        model = set_dimension(content, "cache", max_seq)
        if window is not None and max_seq <= window:
            model = drop_window_masks(model)
        if greedy:
            model = drop_draws(model)
    except ValueError as error:
        raise BuildError(f"{graph} is no ONNX file ({error}); export the model again") from error
    builder = library.module.Builder(library.logger)
    network = builder.create_network(0)
    parser = library.module.OnnxParser(network, library.logger)
    if not parser.parse(model, str(graph)):
        raise BuildError(f"{library.title} cannot parse {graph}: {_first_error(library, parser)}")
    return ParsedNetwork(builder, network, parser)


def allow_unfused_attention(library: Library, network: Any) -> None:
    """Let attention be computed by several kernels: FP32 has no fused one (for tests; FP16 and BF16 have)."""
    for layer in layers_of(network):
        if layer.type.name == "ATTENTION_INPUT":
            library.as_kind(layer, "IAttentionInputLayer").attention.decomposable = True


def _first_error(library: Library, parser: Any) -> str:
    if not parser.num_errors:
        return library.last_message()
    error = parser.get_error(0)
    what = " ".join(error.desc().split())
    return f"{error.node_operator()} {error.node_name()}: {what}"


def _specs(tensors: Iterable[Any], written: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    shapes = {spec.name: spec.shape for spec in written}
    return tuple(_spec(tensor, shapes[tensor.name]) for tensor in tensors)


def _spec(tensor: Any, written: Sequence[int | str]) -> TensorSpec:
    dtype = tensor.dtype.name
    shape = tuple(name if size == -1 else size for size, name in zip(tensor.shape, written, strict=True))
    return TensorSpec(tensor.name, _DTYPES.get(dtype, dtype.lower()), shape)
