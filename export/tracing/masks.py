"""Read the attention pattern that a model asks for, as a window, instead of building its mask."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

from starling.engine.errors import UnsupportedModelError

P = ParamSpec("P")
T = TypeVar("T")


class StandInUsed(UnsupportedModelError, AttributeError):
    """An attribute that a stand-in does not have; `hasattr` may ask for it."""


@dataclass(frozen=True, slots=True)
class CausalPattern:
    """A token sees itself and the `window` - 1 positions before it (None: all of them)."""

    window: int | None

    def __getattr__(self, name: str) -> Any:
        raise StandInUsed(f"it computes with its attention mask ({name}), which is not made")

    def __getitem__(self, index: object) -> Any:
        raise StandInUsed("it takes parts of its attention mask, which is not made")


def read_pattern(mask_function: Callable[..., Any], max_positions: int) -> CausalPattern:
    """The pattern of a transformers mask function, found by asking it.

    `mask_function(batch, head, query_position, key_position)` says whether a query sees a key. The rows asked are
    the last, which shows the window, and some before it, which must agree.

    Raises:
        UnsupportedModelError: the pattern is not causal with at most one window (chunked, prefix, bidirectional, …).
    """
    return untraced(_ask, mask_function, max_positions)


def _ask(mask_function: Callable[..., Any], max_positions: int) -> CausalPattern:
    window = int(_row(mask_function, max_positions - 1, max_positions).sum())
    rows = {0, 1, window - 1, window, window + 1, max_positions // 2, max_positions - 2, max_positions - 1}
    for query in sorted(r for r in rows if 0 <= r < max_positions):
        keys = torch.arange(max_positions)
        expected = (keys <= query) & (keys > query - window)
        if not torch.equal(_row(mask_function, query, max_positions), expected):
            raise UnsupportedModelError(
                "the model's attention pattern is neither causal nor a causal sliding window; it cannot be exported"
            )
    return CausalPattern(window if window < max_positions else None)


def _row(mask_function: Callable[..., Any], query: int, keys: int) -> torch.Tensor:
    zero = torch.tensor(0)
    seen = mask_function(zero, zero, torch.tensor(query), torch.arange(keys))
    return seen.expand(keys) if isinstance(seen, torch.Tensor) else torch.full((keys,), bool(seen))


def untraced(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call `function` with real tensors: torch's tracing modes belong to a thread, so it runs in a fresh one."""
    with ThreadPoolExecutor(max_workers=1) as fresh:
        return fresh.submit(function, *args, **kwargs).result()
