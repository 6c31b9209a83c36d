"""The inputs of a Triton request: what an entry declares, and how their values are read and refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starling.engine.errors import shown
from starling.serving.api.messages import TEMPLATE_FIELDS
from starling.serving.api.tool_fields import TOOL_FIELDS
from starling.serving.triton.socket_messages import RequestError

_OF_CHATS = TOOL_FIELDS | TEMPLATE_FIELDS | {"messages", "template", "chat_template"}
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Tensor:
    """An input or output as config.pbtxt declares it; `dims` without the batch axis, -1 for any length."""

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


@dataclass(frozen=True, slots=True)
class Unsupported:
    """An input that clients of the convention know and this engine lacks: only values that change nothing pass."""

    tensor: Tensor
    neutral: tuple[Any, ...] = ()

    def check(self, values: Sequence[Any]) -> None:
        """Raises RequestError where a value would have to change the answer."""
        for value in values:
            if value not in self.neutral:
                remedy = f"leave it out or give {self.neutral[0]!r}" if self.neutral else "leave it out"
                raise RequestError(f"{self.tensor.name} is {shown(value)}, which is not supported: {remedy}")


class Inputs:
    """The arrays of one request, by name."""

    def __init__(self, arrays: Arrays, *, batched: bool) -> None:
        """`batched`: the first axis is Triton's batch. Raises RequestError for more than one row."""
        self._arrays = arrays
        for name, array in arrays.items():
            if batched and array.shape[:1] != (1,):
                rows = array.shape[0] if array.ndim else 0
                raise RequestError(f"{name} has {rows} rows: send one prompt a request; the engine batches by itself")

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self) -> set[str]:
        """The names that the request came with."""
        return set(self._arrays)

    def all(self, name: str) -> list[Any]:
        """Every value of an input, [] where it is absent; bytes become text. Raises RequestError where not UTF-8."""
        array = self._arrays.get(name)
        return [] if array is None else [_plain(name, value) for value in array.ravel().tolist()]

    def one(self, name: str, default: Any = None) -> Any:
        """The only value of an input, or `default` where it is absent. Raises RequestError for another number."""
        if name not in self._arrays:
            return default
        values = self.all(name)
        if len(values) != 1:
            raise RequestError(f"{name} has {len(values)} values: give one")
        return values[0]


def refuse_chats(names: Iterable[str]) -> None:
    """Raises RequestError for what a chat has: no convention of an entry knows chats, and so no tools."""
    for name in sorted(_OF_CHATS.intersection(names)):
        raise RequestError(
            f"{name} is about chats, which this model's convention has not: send the chat template's text as "
            "text_input, or the chat to starling serve"
        )


def check_names(inputs: Inputs, known: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """Raises RequestError for an input or a request parameter that no one reads: Triton itself would not say."""
    refuse_chats({*inputs.names(), *parameters} - set(known))
    for name in sorted({*inputs.names(), *parameters} - set(known)):
        raise RequestError(f"{name} is no input of this model: leave it out; the model's metadata lists its inputs")


def text_array(text: str, *, batched: bool) -> NDArray[Any]:
    """A string as an output [1], or [1, 1] with Triton's batch axis."""
    return np.array(text.encode(), dtype=object).reshape((1, 1) if batched else (1,))


def _plain(name: str, value: Any) -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None
