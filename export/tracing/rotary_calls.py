"""Stand between a model and its rotary embedding: hand out placeholders for angles, and rotate by tables instead.

The placeholders have the shapes of what the model's own module returns. A function of the modelling code that gets one
and a tensor is a rotation; which one is found by trying it with real numbers.
"""

import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from starling.engine.errors import UnsupportedModelError
from starling.export.tracing.masks import untraced
from starling.export.tracing.rotary import Angles, RotaryTable, angles_by_length, make_table, parts_of

_APPLY = re.compile(r"apply_\w*(rotary|rope)\w*")

#: A rotary embedding module by name, and what it was called with beside the positions.
Key = tuple[str, tuple[tuple[str, Any], ...]]


@dataclass(slots=True)
class Placeholders:
    """What the rotary embedding modules of one step returned: by id(), which call it stands for and which part."""

    known: dict[int, tuple[Key, int]] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)  # an id() is only worth as much as its object lives

    def add(self, key: Key, part: int, tensor: Tensor) -> Tensor:
        self.known[id(tensor)] = (key, part)
        self.kept.append(tensor)
        return tensor


class RotaryCalls:
    """The rotary embedding of one model; `real` is the same model with real buffers.

    `rotate(x, table)` is what a swapped function does; `tables` are those that it was asked for, of `positions` rows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        real: PreTrainedModel,
        rotate: Callable[[Tensor, RotaryTable], Tensor],
        positions: int,
    ) -> None:
        self.name, self.placeholders = type(model).__name__, Placeholders()
        self.tables: list[RotaryTable] = []
        self._model, self._real, self._rotate, self._positions = model, real, rotate, positions
        self._angles: dict[Key, tuple[Angles, int | None]] = {}
        self._found: dict[tuple[Any, ...], RotaryTable] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Swap the functions of the modelling code, which are put back, and the model's modules, which are not."""
        for name, module in list(self._model.named_modules()):
            if _is_rotary(module):
                self._model.set_submodule(name, RotaryNode(self, name, module))
        originals = [
            (code, name, function) for code in _modelling_code(self._real) for name, function in _rotations(code)
        ]
        for code, name, function in originals:
            setattr(code, name, self._swapped(function))
        try:
            yield
        finally:
            for code, name, function in originals:
                setattr(code, name, function)

    def angles(self, key: Key) -> tuple[Angles, int | None]:
        """What the model's own module returns at every position that the bundle can take; see `angles_by_length`."""
        if key not in self._angles:
            module, arguments = self._real.get_submodule(key[0]), dict(key[1])
            original = _original_positions(self._model.config)
            self._angles[key] = untraced(
                angles_by_length, partial(_angles, module, arguments), self._positions, original
            )
        return self._angles[key]

    def notes(self) -> tuple[str, ...]:
        """What a user has to know of the tables."""
        lengths = sorted({table.long_from for table in self.tables if table.long_from is not None})
        return tuple(
            f"rotary embedding: a session of at most {length} positions (--max-seq) rotates by the factors for short "
            "sequences, one of more by those for long ones, whatever a sequence's own length"
            for length in lengths
        )

    def _swapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def apply(*args: Any, **kwargs: Any) -> Any:
            named = inspect.signature(function).bind(*args, **kwargs).arguments
            known = {name: self.placeholders.known.get(id(value)) for name, value in named.items()}
            parts = {name: found for name, found in known.items() if found is not None}
            tensors = {name: x for name, x in named.items() if isinstance(x, Tensor) and name not in parts}
            if not parts or not 1 <= len(tensors) <= 2:
                raise UnsupportedModelError(f"{self.name}: it changes its rotary table before it is used")
            options = {name: x for name, x in named.items() if name not in parts and name not in tensors}
            dim = next(iter(tensors.values())).shape[-1]
            table = self._table(function, parts, tuple(tensors), options, dim)
            rotated = tuple(self._rotate(x, table) for x in tensors.values())
            return rotated if len(rotated) > 1 else rotated[0]

        return apply

    def _table(
        self,
        function: Callable[..., Any],
        parts: dict[str, tuple[Key, int]],
        tensors: tuple[str, ...],
        options: dict[str, Any],
        dim: int,
    ) -> RotaryTable:
        wanted = (function, tuple(parts.items()), tensors, repr(options), dim)
        if wanted not in self._found:

            def apply(angles: Angles, *given: Tensor) -> tuple[Tensor, ...]:
                whole = parts_of(angles)
                named = {name: whole[part] for name, (_, part) in parts.items()}
                result = function(**named, **dict(zip(tensors, given, strict=False)), **options)
                return (result,) if isinstance(result, Tensor) else result

            self._found[wanted] = untraced(self._made, *self.angles(next(iter(parts.values()))[0]), apply, dim)
        return self._found[wanted]

    def _made(
        self, angles: Angles, long_from: int | None, apply: Callable[..., tuple[Tensor, ...]], dim: int
    ) -> RotaryTable:
        """A new table, or the one that has the same numbers."""
        table = make_table(angles, apply, dim, self.name, long_from)
        same = next((known for known in self.tables if _same(known, table)), None)
        if same is None:
            self.tables.append(table)
        return same or table


class RotaryNode(nn.Module):
    """Hands out placeholders in place of computed cosines and sines."""

    def __init__(self, calls: RotaryCalls, name: str, module: nn.Module) -> None:
        super().__init__()
        self._calls, self._name = calls, name
        self._signature = inspect.signature(module.forward)
        self._swapped = [module]  # in a list, so that its buffers are no longer the model's

    def __getattr__(self, name: str) -> Any:
        """What else the model's code reads of its module, such as `config`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_swapped"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, ...]:
        arguments = dict(self._signature.bind(*args, **kwargs).arguments)
        x = arguments.pop(next(iter(arguments)))
        position_ids = arguments.pop("position_ids", None)
        if not isinstance(position_ids, Tensor) or any(isinstance(v, Tensor) for v in arguments.values()):
            raise UnsupportedModelError(f"{self._calls.name}: its rotary embedding takes more than positions")
        key = (self._name, tuple(sorted(arguments.items())))
        angles, _ = self._calls.angles(key)
        parts = parts_of(angles)
        made = tuple(
            self._calls.placeholders.add(key, index, _like(part, x, position_ids)) for index, part in enumerate(parts)
        )
        return made[0] if isinstance(angles, Tensor) else made


def _like(part: Tensor, x: Tensor, position_ids: Tensor) -> Tensor:
    dtype = part.dtype if part.is_complex() else x.dtype
    return torch.empty((*position_ids.shape, *part.shape[2:]), dtype=dtype)


def _angles(module: nn.Module, arguments: dict[str, Any], positions: int) -> Angles:
    with torch.no_grad():
        angles: Angles = module(torch.zeros(1, 1, 1), position_ids=torch.arange(positions)[None], **arguments)
    return angles


def _original_positions(config: PreTrainedConfig) -> int | None:
    """The length of context that the model had before it was stretched."""
    parameters = getattr(config, "rope_parameters", None) or {}
    found = parameters.get(
        "original_max_position_embeddings", getattr(config, "original_max_position_embeddings", None)
    )
    return None if found is None else int(found)


def _is_rotary(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RotaryEmbedding")


def _same(a: RotaryTable, b: RotaryTable) -> bool:
    flags = ("interleaved", "sorted_first", "sequence_first", "long_from")
    return all(getattr(a, flag) == getattr(b, flag) for flag in flags) and all(
        torch.equal(x, y) for x, y in ((a.cos, b.cos), (a.sin, b.sin))
    )


def _modelling_code(model: nn.Module) -> list[ModuleType]:
    """The files that the model's modules are written in."""
    names = dict.fromkeys(type(module).__module__ for module in model.modules())
    return [sys.modules[name] for name in names if name.startswith("transformers.models.")]


def _rotations(code: ModuleType) -> list[tuple[str, Callable[..., Any]]]:
    return [(name, value) for name, value in vars(code).items() if _APPLY.fullmatch(name) and inspect.isfunction(value)]
