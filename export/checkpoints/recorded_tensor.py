"""Tensors without values that remember how they were made, so that the values can be made later, rows at a time.

transformers renames, stacks, concatenates and splits what a checkpoint stores. Given recorded tensors in place of the
stored ones it does all of that within milliseconds and reads nothing; what it hands the model then says how to make
each parameter of the stored tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Rows `start:stop` of a stored tensor: read(name, start, stop).
Read = Callable[[str, int, int], Tensor]
# What gives the same values under another dtype, device or layout. The stored dtype is kept.
_SAME_VALUES = frozenset({"to", "detach", "contiguous", "clone", "requires_grad_", "float", "half", "bfloat16", "cpu"})


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """A PyTorch function of recorded tensors; `output` is which of several results, that begins at row `first`."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: int | None = None
    first: int = 0


class RecordedTensor(Tensor):
    """A tensor on the device "meta", with `made`: the name of a stored tensor, or the operation that gave it."""

    made: str | Operation

    @staticmethod
    def stored(name: str, shape: tuple[int, ...]) -> RecordedTensor:
        """Stands for the stored tensor `name`."""
        return _recorded(torch.empty(shape, device="meta"), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "equal":  # transformers asks whether two tied tensors are one; their values are not known yet
            return args[0] is args[1]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if isinstance(result, RecordedTensor):
            return result
        if isinstance(result, Tensor):
            if name in _SAME_VALUES or (name == "__getitem__" and args[1] is ...):
                return _recorded(result, args[0].made)
            return _recorded(result, Operation(func, args, kwargs))
        if isinstance(result, (tuple, list)) and all(isinstance(each, Tensor) for each in result):
            first, parts = 0, []
            for index, each in enumerate(result):
                parts.append(_recorded(each, Operation(func, args, kwargs, index, first)))
                first += each.shape[0] if each.ndim else 0
            return tuple(parts)
        return result


def sources(tensor: RecordedTensor) -> Iterator[str]:
    """The stored tensors that it is made of; one that is used twice comes twice."""
    if isinstance(tensor.made, str):
        yield tensor.made
        return
    for each in _tensors_in((tensor.made.args, tensor.made.kwargs)):
        yield from sources(each)


def make_rows(tensor: RecordedTensor, start: int, stop: int, read: Read) -> Tensor:
    """Rows `start:stop` of its values.

    No more is read than they need where the rows of stacks, concatenations, transposes and splits are concerned (one
    expert of many, one of query, key and value); anything else is made whole first.
    """
    if start >= stop:
        return make_rows(tensor, 0, 1, read)[:0]
    made = tensor.made
    if isinstance(made, str):
        return read(made, start, stop)
    make = _BY_ROWS.get(getattr(made.function, "__name__", ""))
    rows = None if make is None else make(made, start, stop, read)
    return _whole(made, read)[start:stop] if rows is None else rows


def _recorded(data: Tensor, made: str | Operation) -> RecordedTensor:
    tensor: RecordedTensor = Tensor._make_subclass(RecordedTensor, data)
    tensor.made = made
    return tensor


def _tensors_in(value: Any) -> Iterator[RecordedTensor]:
    if isinstance(value, RecordedTensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(tuple(value.values()))
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors_in(each)


def _values_of(value: Any, read: Read) -> Any:
    """The arguments of an operation with values in place of recorded tensors."""
    if isinstance(value, RecordedTensor):
        return make_rows(value, 0, height(value), read)
    if isinstance(value, dict):
        return {key: _values_of(each, read) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_values_of(each, read) for each in value)
    return value


def _whole(made: Operation, read: Read) -> Tensor:
    result = made.function(*_values_of(made.args, read), **_values_of(made.kwargs, read))
    picked: Tensor = result if made.output is None else result[made.output]
    return picked


def height(tensor: Tensor) -> int:
    """The length of its first axis; 1 of a single number."""
    return tensor.shape[0] if tensor.ndim else 1


def _argument(made: Operation, position: int, name: str, default: int) -> int:
    value = made.args[position] if len(made.args) > position else made.kwargs.get(name, default)
    return int(value)


def _stack(made: Operation, start: int, stop: int, read: Read) -> Tensor | None:
    parts = made.args[0]
    axis = _argument(made, 1, "dim", 0) % (parts[0].ndim + 1)
    if axis:
        return torch.stack([make_rows(part, start, stop, read) for part in parts], axis)
    return torch.stack([make_rows(part, 0, height(part), read) for part in parts[start:stop]])


def _cat(made: Operation, start: int, stop: int, read: Read) -> Tensor | None:
    parts = made.args[0]
    axis = _argument(made, 1, "dim", 0) % parts[0].ndim
    if axis:
        return torch.cat([make_rows(part, start, stop, read) for part in parts], axis)
    pieces, first = [], 0
    for part in parts:
        low, high = max(start - first, 0), min(stop - first, height(part))
        if low < high:
            pieces.append(make_rows(part, low, high, read))
        first += height(part)
    return torch.cat(pieces)


def _transpose(made: Operation, start: int, stop: int, read: Read) -> Tensor | None:
    source = made.args[0]
    axes = [_argument(made, 1 + i, f"dim{i}", i) % source.ndim for i in (0, 1)]
    return None if 0 in axes else make_rows(source, start, stop, read).transpose(*axes)


def _split(made: Operation, start: int, stop: int, read: Read) -> Tensor | None:
    source = made.args[0]
    assert made.output is not None
    if _argument(made, 2, "dim", 0) % source.ndim == 0:
        return make_rows(source, made.first + start, made.first + stop, read)
    several = made.function(make_rows(source, start, stop, read), *made.args[1:], **made.kwargs)
    part: Tensor = several[made.output]
    return part


# torch.nn.Linear's rows are its outputs: every function here keeps a tensor's first axis, or cuts along it.
_BY_ROWS: dict[str, Callable[[Operation, int, int, Read], Tensor | None]] = {
    "stack": _stack,
    "cat": _cat,
    "transpose": _transpose,
    "chunk": _split,
    "split": _split,
}
