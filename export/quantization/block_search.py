"""The scale and zero point of a block of weights, chosen among many for the least weighted error of rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the settings are looked at before PyTorch is loaded
    from collections.abc import Iterator

    from torch import Tensor

_SHRINKS = tuple(1 - 0.05 * step for step in range(9))  # of the block's range: what is cut off may be worth it
_SHIFTS = (-1, 0, 1)  # of the zero point from where the range puts it
_FITS = 2
_SMALLEST = 2.0**-14  # the least normal float16


def search_grid(columns: Tensor, importance: Tensor, bits: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points, float32 [n], of n blocks that stand in the columns of `columns` [block, n], float32.

    The error of weight i of a block is weighed by `importance` [block, 1] (or [block, n]), 0 or more. Tried are ranges
    smaller than the block's; the best one's scale is then fitted to its rounded weights (least squares). Scales are
    values of float16; a symmetric one may be negative, so that either end of the range can take the greatest weight.
    """
    import torch

    scale, zero, best = None, None, None
    for tried, offset in _candidates(columns, bits, symmetric=symmetric):
        cost = _cost(columns, importance, tried, offset, bits)
        if scale is None or zero is None or best is None:
            scale, zero, best = tried, offset, cost
            continue
        better = cost < best
        best = torch.where(better, cost, best)
        scale, zero = torch.where(better, tried, scale), torch.where(better, offset, zero)
    assert scale is not None
    assert zero is not None
    assert best is not None
    for _ in range(_FITS):
        fitted = _fit(columns, importance, scale, zero, bits)
        cost = _cost(columns, importance, fitted, zero, bits)
        scale, best = torch.where(cost < best, fitted, scale), torch.minimum(cost, best)
    return scale, zero


def quantized(columns: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The whole numbers 0 … 2**bits - 1, float32, of `columns` [..., n] on the grids of `scale` and `zero` [n]."""
    return (columns / scale).add_(zero).round_().clamp_(0, 2**bits - 1)


def _cost(columns: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The weighted squared error of each block."""
    error = quantized(columns, scale, zero, bits).sub_(zero).mul_(scale).sub_(columns)
    return error.square_().mul_(importance).sum(dim=0)


def _candidates(columns: Tensor, bits: int, *, symmetric: bool) -> Iterator[tuple[Tensor, Tensor]]:
    import torch

    top = 2**bits - 1
    if symmetric:
        greatest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))[0]
        middle = torch.full_like(greatest, (top + 1) // 2)
        for end in (-greatest / middle, greatest / (middle - 1)):
            yield from ((_float16(end * shrink), middle) for shrink in _SHRINKS)
        return
    low, high = columns.amin(dim=0).clamp_(max=0), columns.amax(dim=0).clamp_(min=0)
    for shrink in _SHRINKS:
        scale = _float16((high - low) * (shrink / top))
        offset = (-low * shrink / scale).round_()
        yield from ((scale, (offset + shift).clamp_(0, top)) for shift in _SHIFTS)


def _fit(columns: Tensor, importance: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The scale with the least weighted error for the whole numbers that `scale` gives; `scale` where there is none."""
    import torch

    codes = quantized(columns, scale, zero, bits).sub_(zero)
    weighed = codes * importance
    above, below = (weighed * columns).sum(dim=0), (weighed * codes).sum(dim=0)
    return torch.where(above * scale > 0, _float16(above / below.clamp(min=1e-30)), scale)


def _float16(scale: Tensor) -> Tensor:
    """The nearest values of float16, as float32, but none that is (nearly) zero."""
    import torch

    size = scale.abs().clamp_(min=_SMALLEST, max=65504).half().float()
    return torch.where(scale < 0, -size, size)
