"""What the card itself reaches: bytes a second of copying and reading, and of PyTorch's matrix products."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from starling.profiling.gpu.stages.kit import Kit

_BYTES, _DRY_BYTES = 2 << 30, 8 << 20
#: [n, k] of the 7B shape's products.
_PRODUCTS = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (32002, 4096), (32064, 4096))
_DRY_PRODUCTS = ((96, 64),)
_ROWS = (1, 4, 16)
_ROTATED_BYTES = 400 << 20  # of weights that a timing reads in turn: many times an L2 cache


def run(kit: Kit) -> None:
    """Copy and read gigabytes, then the products with weights [n, k] and [k, n]."""
    device, size = kit.machine.torch_device, _BYTES if kit.machine.is_card else _DRY_BYTES
    copied, read = bandwidths(device, size)
    kit.results.write(copy_TBs=round(copied / 1e12, 3), read_TBs=round(read / 1e12, 3))
    for n, k in _PRODUCTS if kit.machine.is_card else _DRY_PRODUCTS:
        with kit.results.guarded(n=n, k=k):
            _products(kit, n, k)


def bandwidths(device: str, size: int) -> tuple[float, float]:
    """Bytes a second, read and written in a copy, and read alone."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    numbers = source.view(torch.int32)
    copy_ms = device_ms(device, lambda: target.copy_(source))
    read_ms = device_ms(device, lambda: numbers.max())
    return 2 * size / copy_ms * 1e3, size / read_ms * 1e3


def _products(kit: Kit, n: int, k: int) -> None:
    device = kit.machine.torch_device
    dtype = torch.float16 if kit.machine.is_card else torch.float32
    copies = max(2, _ROTATED_BYTES // (2 * n * k)) if kit.machine.is_card else 2
    rows_first = [torch.randn(n, k, device=device, dtype=dtype) for _ in range(copies)]
    columns_first = [weight.T.contiguous() for weight in rows_first]
    for rows in _ROWS:
        x = torch.randn(rows, k, device=device, dtype=dtype)
        by_rows = _each_us(device, lambda w, x=x: torch.nn.functional.linear(x, w), rows_first)  # type: ignore[misc]
        by_columns = _each_us(device, lambda w, x=x: x @ w, columns_first)  # type: ignore[misc]
        kit.results.write(
            product=[n, k],
            rows=rows,
            torch_us=round(by_rows, 1),
            torch_transposed_us=round(by_columns, 1),
            tbs=round(n * k * dtype.itemsize / min(by_rows, by_columns) / 1e6, 2),
        )


def _each_us(device: str, multiply: Callable[[Any], object], weights: list[torch.Tensor]) -> float:
    return device_ms(device, lambda: [multiply(weight) for weight in weights], 5) / len(weights) * 1e3


def device_ms(device: str, work: Callable[[], object], runs: int = 20) -> float:
    """Mean milliseconds by the device's own clock."""
    for _ in range(3):
        work()
    if device == "cpu":
        begin = perf_counter()
        for _ in range(runs):
            work()
        return (perf_counter() - begin) / runs * 1e3
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(runs):
        work()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / runs
