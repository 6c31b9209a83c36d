"""What a checkpoint's configuration may ask for before a model is made of it: numbers that end, and no code."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from starling.engine.errors import CheckpointError, UnsupportedModelError

#: The most that a setting may be, by its name; a model's class makes a module, or an entry, for each of them.
_MOST = (
    (re.compile(r"(num|n)_(\w+_)?layers?"), 1024),
    (re.compile(r"\w*experts"), 4096),
    (re.compile(r"num_labels"), 2**16),
)
_MOST_OTHERWISE = 2**31 - 1
#: Settings that name code of a model hub, which transformers would fetch and run.
_IMPLEMENTATION = re.compile(r"_?\w+_implementation")


def check_config(values: Mapping[str, Any], where: str) -> None:
    """Raise where the settings of `where`, nested ones too, are out of every model's range or name code to run.

    Raises CheckpointError and UnsupportedModelError.
    """
    for name, value in _settings(values):
        if isinstance(value, int) and not isinstance(value, bool):
            most = next((most for pattern, most in _MOST if pattern.fullmatch(name)), _MOST_OTHERWISE)
            if abs(value) > most:
                raise CheckpointError(f"{where}: {name} is {_short(value)}, more than {most:,}: get the file again")
        if _IMPLEMENTATION.fullmatch(name) and isinstance(value, str) and "/" in value:
            raise UnsupportedModelError(
                f"{where}: {name} is {value[:80]!r}, code of a model hub, which is never run: remove the setting"
            )


def check_layers(layers: object, tensors: int, where: str) -> None:
    """Raise CheckpointError for more layers than `where` has tensors: a model of them all takes seconds to make."""
    if isinstance(layers, int) and layers > tensors:
        raise CheckpointError(
            f"{where} has {tensors} tensors, too few for the {layers} layers that its configuration says: get it again"
        )


def _short(value: int) -> str:
    return str(value) if abs(value) < 10**18 else f"about 2^{abs(value).bit_length() - 1}"


def _settings(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _settings(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner, name)
    else:
        yield name, value
