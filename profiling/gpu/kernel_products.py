"""The products of a decode step by the CUDA kernels: what is tried, checked and timed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from starling.engine.kernels.cuda.variants import ADD_RESIDUAL, GATED, STORE, Linear, LinearArguments, NormArguments
from starling.profiling.gpu.card import NORM, Source, Target

EPSILON = 1e-5
#: Up to here each block normalizes the rows itself.
MOST_NORMALIZED_ROWS = 4
_GUARD = 256  # elements after an output that must stay as they are
_ROTATION_BYTES = 1 << 30  # of weights that a timing reads in turn: many times an L2 cache


@dataclass(frozen=True, slots=True)
class Product:
    """[n, k] weights, and what stands around their product."""

    name: str
    n: int
    k: int
    norm: bool = False
    epilogue: int = STORE

    @property
    def width(self) -> int:
        return self.n // 2 if self.epilogue == GATED else self.n

    def bytes(self, bits: int) -> int:
        """Read in a step: weights, and the scales of int8."""
        return self.n * self.k * bits // 8 + (self.n * self.k // 16 if bits == 8 else 0)


@dataclass(frozen=True, slots=True)
class Model:
    """Sizes of a decoder."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    positions: int

    def products(self) -> list[Product]:
        """Of a layer, in their order; then lm_head."""
        qkv = (self.heads + 2 * self.kv_heads) * 128
        return [
            Product("qkv", qkv, self.hidden, norm=True),
            Product("o", self.hidden, self.heads * 128, epilogue=ADD_RESIDUAL),
            Product("gate_up", 2 * self.intermediate, self.hidden, norm=True, epilogue=GATED),
            Product("down", self.hidden, self.intermediate, epilogue=ADD_RESIDUAL),
            Product("lm_head", self.vocabulary, self.hidden, norm=True),
        ]


MISTRAL_7B = Model(4096, 14336, 32, 32, 8, 32002, 2304)
TINY = Model(1024, 1024, 2, 8, 2, 130, 457)

# (warps, unroll, depth, row tiles, blocks of a multiprocessor that the registers must leave room for)
_FEW_ROWS = [
    (8, 4, 2, 1, 2), (8, 4, 2, 1, 1), (4, 4, 2, 1, 4), (8, 4, 1, 1, 2), (4, 8, 1, 1, 4), (8, 2, 2, 1, 3),
    (4, 8, 2, 1, 2), (16, 4, 1, 1, 1), (16, 2, 2, 1, 1), (8, 2, 4, 1, 2), (4, 2, 4, 1, 4), (8, 2, 2, 2, 2),
    (4, 4, 2, 2, 2), (8, 8, 1, 1, 2), (2, 8, 2, 1, 4), (14, 4, 2, 1, 1), (7, 4, 2, 1, 2), (14, 4, 1, 1, 1),
]  # fmt: skip
_MANY_ROWS = [
    (8, 4, 1, 2, 1), (8, 2, 2, 2, 1), (4, 2, 2, 2, 2), (8, 1, 3, 4, 1), (8, 2, 1, 4, 1), (4, 4, 1, 2, 2),
    (8, 4, 2, 1, 1), (4, 1, 2, 4, 2), (4, 2, 2, 1, 4), (16, 2, 1, 2, 1), (7, 2, 2, 2, 1), (4, 1, 2, 8, 1),
]  # fmt: skip


def candidates(product: Product, bits: int, rows: int) -> list[Linear]:
    """Variants for a product, the likeliest first."""
    tried = []
    for warps, unroll, depth, tiles, blocks in _FEW_ROWS if rows <= 4 else _MANY_ROWS:
        row_tiles = max(tiles, 2) if product.epilogue == GATED else tiles
        if product.epilogue == GATED and row_tiles > tiles and unroll * depth > 4:
            unroll //= 2
        variant = Linear(
            product.k, bits, rows, product.norm and rows <= MOST_NORMALIZED_ROWS, product.epilogue, row_tiles, warps,
            unroll, depth, blocks,
        )  # fmt: skip
        if variant.is_valid and variant not in tried:
            tried.append(variant)
    return tried


@dataclass(slots=True)
class Pool:
    """Random weights, of which products take pieces: values of one kind, one after another."""

    data: Any
    scales: Any

    @classmethod
    def make(cls, bits: int, elements: int, device: str) -> Pool:
        if bits == 16:
            data = torch.empty(elements, dtype=torch.float16, device=device)
            for piece in torch.split(data, 1 << 30):
                piece.normal_(0, 0.02)
            return cls(data, torch.empty(32, dtype=torch.float16, device=device))
        data = torch.empty(elements, dtype=torch.uint8, device=device)
        for piece in torch.split(data, 1 << 30):
            piece.random_(0, 256)
        scales = torch.empty(elements // 32, dtype=torch.float16, device=device).uniform_(2e-4, 4e-4)
        return cls(data, scales)

    def weights(self, product: Product, start: int) -> tuple[Any, Any]:
        """Data [n, k] and, for int8, scales [n, k / 32]; `start` in elements, a multiple of 256."""
        count = product.n * product.k
        data = self.data[start : start + count].view(product.n, product.k)
        if self.data.dtype == torch.float16:
            return data, self.scales
        return data, self.scales[start // 32 : (start + count) // 32].view(product.n, product.k // 32)

    def starts(self, product: Product, most_bytes: int = _ROTATION_BYTES) -> list[int]:
        count = product.n * product.k
        size = count * self.data.element_size()
        copies = min(self.data.numel() // count, max(2, -(-most_bytes // size)), 64)
        return [i * count for i in range(copies)]


def dequantized(data: Any, scales: Any) -> Any:
    if data.dtype == torch.float16:
        return data.double()
    blocks = (data.double() - 128).view(data.shape[0], -1, 32)
    return (blocks * scales.double()[:, :, None]).view(data.shape)


def normalized(x: Any, weight: Any) -> Any:
    x = x.double()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + EPSILON) * weight.double()


def expected(product: Product, x: Any, weights: Any, norm: Any, residual: Any, *, normalize: bool) -> Any:
    """In double precision, as reference.py has it."""
    out = (normalized(x, norm) if normalize else x.double()) @ weights.T
    if product.epilogue == GATED:
        gate, value = out.chunk(2, dim=1)
        out = torch.nn.functional.silu(gate) * value
    return out + residual.double() if product.epilogue == ADD_RESIDUAL else out


def relative_error(out: Any, wanted: Any) -> float:
    return float((out.double() - wanted).norm() / wanted.norm())


def launcher(
    target: Target, variant: Linear, product: Product, weights: tuple[Any, Any], x: Any, norm: Any, residual: Any,
    out: Any, *, persistent: int, early: bool,
) -> Callable[[], None]:  # fmt: skip
    """A launch of the product, to be called as often as wanted."""
    data, scales = weights
    arguments = LinearArguments(
        out.data_ptr(), x.data_ptr(), data.data_ptr(), scales.data_ptr(), norm.data_ptr(), residual.data_ptr(),
        x.shape[0], product.n, EPSILON,
    )  # fmt: skip
    source = Source.of(variant)
    grid = replace(variant, persistent=persistent).grid(product.n, target.multiprocessors)
    return lambda: target.launch(source, grid, arguments, early=early)


def norm_launcher(target: Target, x: Any, weight: Any, out: Any, *, early: bool) -> Callable[[], None]:
    arguments = NormArguments(out.data_ptr(), x.data_ptr(), weight.data_ptr(), x.shape[1], EPSILON)
    return lambda: target.launch(NORM, (x.shape[0], 1, 1), arguments, early=early)


def inputs(product: Product, rows: int, device: str) -> tuple[Any, Any, Any]:
    """x [rows, k], norm [k], residual [rows, width], drawn anew."""
    x = torch.randn(rows, product.k, device=device).half()
    norm = (torch.rand(product.k, device=device) + 0.5).half()
    return x, norm, torch.randn(rows, product.width, device=device).half()


def check(target: Target, variant: Linear, product: Product, pool: Pool, rows: int, *, persistent: int = 0) -> float:
    """The relative error, on random data into a poisoned output; raises where it writes past the output's end."""
    start = random.randrange(0, (pool.data.numel() - product.n * product.k) // 256 + 1) * 256
    data, scales = pool.weights(product, start)
    x, norm, residual = inputs(product, rows, target.device)
    guarded = torch.full((rows * product.width + _GUARD,), float("nan"), dtype=torch.float16, device=target.device)
    out = guarded[:-_GUARD].view(rows, product.width)
    for early in (True, False):
        guarded.fill_(float("nan"))
        run = launcher(
            target, variant, product, (data, scales), x, norm, residual, out, persistent=persistent, early=early
        )
        run()
        target.synchronize()
        if not bool(guarded[-_GUARD:].isnan().all()):
            raise RuntimeError("writes past the end of its output")
        if not target.is_card:
            break
    return relative_error(out, expected(product, x, dequantized(data, scales), norm, residual, normalize=variant.norm))


def time_product(
    target: Target, variant: Linear, product: Product, pool: Pool, rows: int, *, persistent: int, early: bool
) -> float:
    """µs a product, each reading other weights."""
    x, norm, residual = inputs(product, rows, target.device)
    out = torch.empty(rows, product.width, dtype=torch.float16, device=target.device)
    starts = pool.starts(product) if target.is_card else [0]
    runs = [
        launcher(
            target, variant, product, pool.weights(product, start), x, norm, residual, out, persistent=persistent,
            early=early,
        )
        for start in starts
    ]  # fmt: skip

    def work() -> None:
        for run in runs:
            run()

    return target.time_us(work, 9) / len(runs)


def time_torch(target: Target, product: Product, pool: Pool, rows: int) -> float:
    """µs of PyTorch's own fp16 product."""
    x = torch.randn(rows, product.k, device=target.device).half()
    out = torch.empty(rows, product.n, dtype=torch.float16, device=target.device)
    weights = [pool.weights(product, start)[0] for start in pool.starts(product)]

    def work() -> None:
        for weight in weights:
            torch.mm(x, weight.t(), out=out)

    return target.time_us(work, 9) / len(weights)
