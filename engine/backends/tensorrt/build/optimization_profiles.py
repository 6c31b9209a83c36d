"""The two optimization profiles of a plan: prefill of up to --max-prefill tokens, decode of one token per row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starling.engine.backends.tensorrt.plan_record import Profile, ShapeRange
from starling.engine.backends.tensorrt.runtimes import inputs_of
from starling.engine.errors import BuildError

#: A profile whose batch is fixed at 1 gets its own copy of the weights, so that one more row is always allowed.
LEAST_MAX_BATCH = 2
#: From this length of the KV cache on, no kernel takes a profile with exactly one token: it must allow two.
_TWO_TOKENS_FROM = 24576
#: Prompts are tuned for this many tokens where the plan allows them.
_USUAL_PROMPT = 256

_Sizes = Mapping[str, tuple[int, int, int]]


def make_profiles(network: Any, *, max_batch: int, max_prefill: int, max_seq: int) -> tuple[Profile, ...]:
    """The profiles for a network whose dynamic dimensions are called "batch" and "sequence".

    Raises BuildError where an input has another dynamic dimension.
    """
    most_rows = max(LEAST_MAX_BATCH, max_batch)
    decode_tokens = 2 if max_seq >= _TWO_TOKENS_FROM else 1
    prefill = {"batch": (1, 1, most_rows), "sequence": (1, min(max_prefill, _USUAL_PROMPT), max_prefill)}
    decode = {"batch": (1, max_batch, most_rows), "sequence": (1, 1, decode_tokens)}
    return _profile("prefill", network, prefill), _profile("decode", network, decode)


def add_profiles(builder: Any, config: Any, profiles: tuple[Profile, ...]) -> None:
    """Add the profiles to a builder configuration, in order."""
    for profile in profiles:
        added = builder.create_optimization_profile()
        for name, shapes in profile.shapes.items():
            added.set_shape(name, shapes.min, shapes.opt, shapes.max)
        config.add_optimization_profile(added)


def _profile(name: str, network: Any, sizes: _Sizes) -> Profile:
    ranges = {}
    for tensor in inputs_of(network):
        if -1 in tuple(tensor.shape):
            ranges[tensor.name] = ShapeRange(*(_shape(tensor, sizes, which) for which in range(3)))
    return Profile(name, ranges)


def _shape(tensor: Any, sizes: _Sizes, which: int) -> tuple[int, ...]:
    shape = []
    for axis, size in enumerate(tensor.shape):
        if size != -1:
            shape.append(size)
            continue
        dimension = tensor.get_dimension_name(axis)
        if dimension not in sizes:
            raise BuildError(
                f"input {tensor.name} has the dynamic dimension {dimension!r}, and no profile gives it a size; export "
                "the model with --dialect tensorrt"
            )
        shape.append(sizes[dimension][which])
    return tuple(shape)
