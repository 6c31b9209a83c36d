"""Typed reads from a JSON object that a person or a broken copy may have spoilt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, TypeVar, cast

from starling.engine.errors import BundleError, UserError

T = TypeVar("T")

#: The largest whole number: what C++ code calls int64.
MOST = 2**63 - 1
_WORDS = {int: "a number >= 0", float: "a number", str: "a string", bool: "true or false"}


class JsonFields:
    """Typed reads from one JSON object; a wrong field raises `error` with its whole path, such as graph.file."""

    def __init__(
        self,
        where: str,
        value: object,
        prefix: str = "",
        *,
        error: type[UserError] = BundleError,
        remedy: str = "export the model again",
    ) -> None:
        self.where, self.prefix, self.error, self.remedy = where, prefix, error, remedy
        if not isinstance(value, dict):
            raise self.bad(prefix.rstrip(".") or "top level", value, "an object")
        self.value = value

    def bad(self, name: str, got: object, wanted: str) -> UserError:
        return self.error(f"{self.where}: {name} is {str(got)[:60]!r}, not {wanted}; {self.remedy}")

    def count(self, name: str, least: int, most: int) -> int:
        """A whole number from `least` to `most`."""
        got = self.get(name, int)
        if not least <= got <= most:
            raise self.bad(self.prefix + name, got, f"a number from {least} to {most}")
        return got

    def get(self, name: str, kind: type[T]) -> T:
        """A field of one type; whole numbers, which must be at least 0, also pass for a float."""
        got = self.value.get(name)
        fits = isinstance(got, int | float if kind is float else kind)
        # bool is an int to Python, but a `true` where a size belongs is a broken file.
        is_number = fits and kind in (int, float)
        if not fits or (isinstance(got, bool) and kind is not bool) or (is_number and not self._is_in_range(got, kind)):
            raise self.bad(self.prefix + name, got, _WORDS.get(kind, "a list"))
        return cast(T, got)

    @staticmethod
    def _is_in_range(got: Any, kind: type) -> bool:
        return 0 <= got <= MOST if kind is int else isfinite(got) if isinstance(got, float) else abs(got) <= MOST

    def optional(self, name: str, kind: type[T]) -> T | None:
        return None if self.value.get(name) is None else self.get(name, kind)

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        got = self.get(name, str)
        if got not in choices:
            raise self.bad(self.prefix + name, got, f"one of {', '.join(choices)}")
        return got

    def mapping(self, name: str) -> Mapping[str, Any]:
        return self.inside(name).value if self.value.get(name) is not None else {}

    def inside(self, name: str) -> JsonFields:
        return self._part(self.value.get(name), f"{name}.")

    def part(self, name: str, read: Callable[[JsonFields], T]) -> T | None:
        """What `read` makes of an object; None where there is none."""
        return None if self.value.get(name) is None else read(self.inside(name))

    def items(self, name: str) -> list[JsonFields]:
        listed = self.get(name, list)
        return [self._part(item, f"{name}[{i}].") for i, item in enumerate(listed)]

    def _part(self, value: object, below: str) -> JsonFields:
        return JsonFields(self.where, value, self.prefix + below, error=self.error, remedy=self.remedy)
