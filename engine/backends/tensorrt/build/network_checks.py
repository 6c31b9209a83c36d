"""What a parsed network must be, so that its plan means what the model means.

TensorRT accepts the standard graph of a decoder and silently changes its meaning: it drops `nonpad_kv_seqlen` and masks
to the upper left. A plan is only built from a network that passes here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from starling.engine.backends.tensorrt.runtimes import Library, inputs_of, layers_of, outputs_of
from starling.engine.errors import BuildError
from starling.engine.names import PAST, PRESENT

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class NetworkFacts:
    """What the checks found: [past input, present output] of each cache, and how many layers of each type there are."""

    aliases: tuple[tuple[str, str], ...]
    layers: dict[str, int]


def check_network(library: Library, network: Any) -> NetworkFacts:
    """Check a parsed network. Raises BuildError naming the first layers and inputs that are wrong."""
    graph = _Graph(network)
    problems = [
        *_unused_inputs(graph),
        *_attention(library, graph),
        *_caches(graph),
        *_norms(library, graph),
    ]
    if problems:
        rest = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise BuildError(
            f"the network would not mean what the model means: {'; '.join(problems[:_SHOWN])}{rest}; export the model "
            "with --dialect tensorrt"
        )
    counts = Counter(layer.type.name for layer in graph.layers)
    return NetworkFacts(tuple(_aliases(graph).items()), dict(sorted(counts.items())))


class _Graph:
    """A network's layers that its outputs depend on, and who makes and who reads each tensor."""

    def __init__(self, network: Any) -> None:
        self.inputs = {tensor.name: tensor for tensor in inputs_of(network)}
        self.outputs = {tensor.name: tensor for tensor in outputs_of(network)}
        every = list(layers_of(network))
        # Tensors have names of their own, layers need not.
        self._makers = {tensor.name: index for index, layer in enumerate(every) for tensor in _outputs(layer)}
        self._every = every
        self.used, needed = self._reach()
        self.layers = [every[index] for index in sorted(needed)]

    def maker(self, tensor: str) -> Any | None:
        """The layer that makes a tensor, None for an input of the network."""
        return self._every[self._makers[tensor]] if tensor in self._makers else None

    def _reach(self) -> tuple[set[str], set[int]]:
        """Names of the tensors and places of the layers that the outputs depend on."""
        tensors, layers, left = set(self.outputs), set[int](), list(self.outputs)
        while left:
            index = self._makers.get(left.pop())
            if index is None or index in layers:
                continue
            layers.add(index)
            found = {tensor.name for tensor in _inputs(self._every[index])} - tensors
            tensors |= found
            left += found
        return tensors, layers

    def of_type(self, *types: str) -> Iterator[Any]:
        return (layer for layer in self.layers if layer.type.name in types)


def _inputs(layer: Any) -> Iterator[Any]:
    tensors = (layer.get_input(index) for index in range(layer.num_inputs))
    return (tensor for tensor in tensors if tensor is not None)


def _outputs(layer: Any) -> Iterator[Any]:
    tensors = (layer.get_output(index) for index in range(layer.num_outputs))
    return (tensor for tensor in tensors if tensor is not None)


def _unused_inputs(graph: _Graph) -> Iterator[str]:
    return (f"input {name} is not used" for name in graph.inputs if name not in graph.used)


def _attention(library: Library, graph: _Graph) -> Iterator[str]:
    kinds = library.module.CausalMaskKind
    for layer in graph.of_type("ATTENTION_INPUT"):
        attention = library.as_kind(layer, "IAttentionInputLayer").attention
        name = layer.name.removesuffix("_AttentionInput")
        if attention.causal_kind == kinds.UPPER_LEFT:
            yield f"attention {name} is causal to the upper left: a decode step would see the first position only"
        elif attention.causal_kind == kinds.NONE and attention.mask is None:
            yield f"attention {name} is neither causal nor masked: a token would see those after it"
        if attention.key_value_lengths is None:
            yield f"attention {name} has no key_value_lengths: it would read the cache beyond what is written"


def _aliases(graph: _Graph) -> dict[str, str]:
    """Past input to present output of each KV cache update that has both."""
    found = {}
    for layer in graph.of_type("KV_CACHE_UPDATE"):
        past, present = layer.get_input(0).name, layer.get_output(0).name
        if past in graph.inputs and present in graph.outputs:
            found[past] = present
    return found


def _caches(graph: _Graph) -> Iterator[str]:
    """A past input or present output that no KV cache update ties to its other half would be copied every step."""
    aliases = _aliases(graph)
    for layer in graph.of_type("KV_CACHE_UPDATE"):
        if layer.get_input(0).name not in aliases:
            yield f"KV cache update {layer.name} does not join a past input and a present output of the network"
    for past in graph.inputs:
        if past.startswith(PAST) and past not in aliases:
            yield f"cache {past} is not aliased: no KV cache update writes it"
    for present in graph.outputs:
        if present.startswith(PRESENT) and present not in aliases.values():
            yield f"cache {present} is not aliased: it does not come from a KV cache update"
    for past, present in aliases.items():
        if past.removeprefix(PAST) != present.removeprefix(PRESENT):
            yield f"cache {past} is written to {present}, another cache"


def _norms(library: Library, graph: _Graph) -> Iterator[str]:
    """Sums and means must be FP32, and so must the squares that go into them: they overflow FP16 first."""
    sums = (library.module.ReduceOperation.SUM, library.module.ReduceOperation.AVG)
    for layer in graph.of_type("REDUCE"):
        if library.as_kind(layer, "IReduceLayer").op not in sums:
            continue
        half = next((tensor for tensor in _statistics(library, layer, graph) if _is_half(tensor)), None)
        if half is not None:
            yield f"norm statistics of {layer.name} are {_dtype(half)} ({half.name}), not FP32"
    for layer in graph.of_type("NORMALIZATION"):
        source = layer.get_input(0)
        if _is_half(source):
            yield f"norm statistics of {layer.name} are {_dtype(source)} ({source.name}), not FP32"


def _statistics(library: Library, reduce: Any, graph: _Graph) -> Iterator[Any]:
    """What a sum is computed in: its output, its input, and a square that a cast to the input hid."""
    source = reduce.get_input(0)
    yield reduce.get_output(0)
    yield source
    cast = graph.maker(source.name)
    if cast is None or cast.type.name != "CAST":
        return
    hidden = graph.maker(cast.get_input(0).name)
    if hidden is not None and _is_square(library, hidden):
        yield hidden.get_output(0)


def _is_square(library: Library, layer: Any) -> bool:
    """Whether a layer is x * x or x ** y."""
    if layer.type.name != "ELEMENTWISE":
        return False
    kinds, operation = library.module.ElementWiseOperation, library.as_kind(layer, "IElementWiseLayer").op
    same = layer.get_input(0).name == layer.get_input(1).name
    return bool(operation == kinds.POW or (operation == kinds.PROD and same))


def _is_half(tensor: Any) -> bool:
    return tensor.dtype.name in ("HALF", "BF16")


def _dtype(tensor: Any) -> str:
    return {"HALF": "FP16"}.get(tensor.dtype.name, str(tensor.dtype.name))
