"""The CUDA kernels' logic in emulation, against NumPy. On a GPU, `profiling.gpu.tune_kernels` checks them."""

import ctypes
import shutil
from typing import Any

import numpy as np
import pytest

from starling.engine.kernels.cuda import compiler, reference
from starling.engine.kernels.cuda.variants import (
    ADD_RESIDUAL,
    GATED,
    STORE,
    Attention,
    AttentionArguments,
    Linear,
    LinearArguments,
    NormArguments,
    Sampling,
    SamplingArguments,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled with g++"),
]

EPSILON = 1e-5
LIMIT = 5e-4  # the rounding of a result to fp16 is 2e-4


def _address(array: Any) -> int:
    return int(array.ctypes.data)


@pytest.mark.parametrize(
    ("variant", "n", "rows"),
    [
        (Linear(1024, 8, 1, warps=4), 34, 1),
        (Linear(1024, 8, 4, warps=4, norm=True, persistent=1), 98, 3),
        (Linear(1024, 8, 16, warps=2, row_tiles=2, unroll=2, depth=3, epilogue=ADD_RESIDUAL), 70, 16),
        (Linear(2048, 8, 4, warps=2, row_tiles=4, unroll=1, depth=4, epilogue=GATED, persistent=1, norm=True), 260, 4),
        (Linear(1024, 8, 8, warps=4, row_tiles=2, epilogue=GATED), 140, 7),
        (Linear(1024, 16, 1, warps=4), 34, 1),
        (Linear(1024, 16, 8, warps=4, norm=True), 34, 7),
        (Linear(1024, 16, 16, warps=2, row_tiles=2, unroll=2, depth=3, epilogue=ADD_RESIDUAL, persistent=1), 170, 16),
        (Linear(1024, 16, 16, warps=4, row_tiles=2, unroll=8, epilogue=GATED), 140, 13),
    ],
)  # fmt: skip
def test_a_product_with_its_surroundings(variant: Linear, n: int, rows: int) -> None:
    random = np.random.default_rng(n + rows)
    x = (random.standard_normal((rows, variant.k)) * (1 if variant.norm else 0.05)).astype(np.float16)
    norm = (random.random(variant.k) + 0.5).astype(np.float16)
    scales = (random.random((n, variant.k // 32)) * 3e-4 + 1e-4).astype(np.float16)
    if variant.bits == 8:
        data = random.integers(0, 256, (n, variant.k)).astype(np.uint8)
        weights = reference.dequantized(data, scales)
    else:
        data = weights = (random.standard_normal((n, variant.k)) * 0.02).astype(np.float16)
    width = n // 2 if variant.epilogue == GATED else n
    residual = random.standard_normal((rows, width)).astype(np.float16)
    guarded = np.full(rows * width + 64, np.nan, np.float16)
    arguments = LinearArguments(*map(_address, (guarded, x, data, scales, norm, residual)), rows, n, EPSILON)

    compiler.emulated("linear.cu", variant.defines()).emulate_linear(
        ctypes.byref(arguments), ctypes.c_uint(variant.grid(n, multiprocessors=2)[0])
    )

    added = residual if variant.epilogue == ADD_RESIDUAL else None
    wanted = reference.linear(
        x, weights, norm if variant.norm else None, EPSILON, added, gated=variant.epilogue == GATED
    )
    assert reference.relative_error(guarded[: rows * width].reshape(rows, width), wanted) < LIMIT
    assert np.isnan(guarded[rows * width :]).all()


@pytest.mark.parametrize(
    ("variant", "lengths", "window"),
    [
        (Attention(4, 4, True, 4), [0], 0),
        (Attention(4, 4, True, 4), [0, 1, 4, 15, 16, 63, 64, 128], 0),
        (Attention(4, 4, False, 4), [5, 127, 255], 0),
        (Attention(4, 2, True, 8), [5, 127, 299], 0),
        (Attention(4, 8, True, 3), [5, 127, 299], 100),
        (Attention(8, 4, True, 3), [5, 250], 0),
        (Attention(1, 4, True, 3), [5, 250], 0),
    ],
)
def test_attention_appends_and_attends(variant: Attention, lengths: list[int], window: int) -> None:
    random = np.random.default_rng(sum(lengths))
    rows, kv_heads, most = len(lengths), 2, 300
    heads = kv_heads * variant.group
    qkv = (random.standard_normal((rows, (heads + 2 * kv_heads) * 128)) * 2).astype(np.float16)
    keys = np.full((rows, kv_heads, most, 128), np.nan, np.float16)
    values = keys.copy()
    for row, length in enumerate(lengths):
        keys[row, :, :length] = random.standard_normal((kv_heads, length, 128))
        values[row, :, :length] = random.standard_normal((kv_heads, length, 128))
    angles = np.arange(most)[:, None] / 10000 ** (np.arange(64) / 64)
    cosines, sines = np.cos(angles).astype(np.float16), np.sin(angles).astype(np.float16)
    past = np.array(lengths, np.int32)
    wanted, wanted_keys, wanted_values = reference.attention(qkv, keys, values, cosines, sines, past, window, 128**-0.5)
    out = np.full((rows, heads * 128), np.nan, np.float16)
    parts = np.full(variant.parts(rows, kv_heads), np.nan, np.float32)
    counters = np.zeros(rows * kv_heads, np.uint32)
    buffers = (out, qkv, keys, values, cosines, sines, past, parts, counters)
    arguments = AttentionArguments(*map(_address, buffers), most, window, 128**-0.5)

    compiler.emulated("attention.cu", variant.defines()).emulate_attention(
        ctypes.byref(arguments), variant.splits, kv_heads, rows
    )

    assert reference.relative_error(out, wanted) < LIMIT
    np.testing.assert_array_equal(keys, wanted_keys)
    np.testing.assert_array_equal(values, wanted_values)
    assert not counters.any()


def test_a_norm_of_its_own() -> None:
    random = np.random.default_rng(1)
    x, weight = random.standard_normal((3, 1024)).astype(np.float16), random.random(1024).astype(np.float16)
    out = np.full_like(x, np.nan)
    arguments = NormArguments(_address(out), _address(x), _address(weight), 1024, EPSILON)
    compiler.emulated("norm.cu", {}).emulate_rms_norm(ctypes.byref(arguments), 3)
    assert reference.relative_error(out, reference.rms_norm(x, weight, EPSILON)) < LIMIT


def _sampled(logits: Any, draws: reference.Draws, variant: Sampling, kept: int = 1) -> Any:
    """Tokens [rows, kept] by the kernel, for bits of logits [rows, kept, vocabulary]; uniform [rows, kept]."""
    rows, positions, first = len(logits), kept + 5, 3
    noise = np.full((rows, positions), np.nan, np.float32)
    noise[:, first : first + kept] = np.reshape(draws.uniform, (rows, kept))
    lengths, tokens = np.full(rows, first + kept, np.int32), np.full((rows, kept), -7, np.int64)
    settings = (draws.temperature, draws.top_k, draws.top_p, draws.min_p)
    buffers = (logits, *settings, noise, lengths, tokens)
    arguments = SamplingArguments(*map(_address, buffers), logits.shape[-1], positions)
    library = compiler.emulated("sampling.cu", variant.defines())
    assert library.shared_bytes() == variant.shared_bytes
    library.emulate_sample(ctypes.byref(arguments), rows, kept)
    return tokens


def _draws(*rows: tuple[float, int, float, float], seed: int) -> reference.Draws:
    uniform = np.random.default_rng(seed).random(len(rows))
    types = (np.float32, np.int64, np.float32, np.float32, np.float32)
    return reference.Draws(
        *(np.array(each, t) for each, t in zip((*zip(*rows, strict=True), uniform), types, strict=True))
    )


@pytest.mark.parametrize("vocabulary", [37, 1000, 32002])
@pytest.mark.parametrize("bfloat16", [False, True])
def test_tokens_are_drawn_as_numpy_draws_them(vocabulary: int, bfloat16: bool) -> None:
    settings = [(0.7, 0, 1, 0), (1, 0, 0.9, 0), (1.4, 0, 0.5, 0), (1, 5, 1, 0), (0.8, 40, 0.95, 0), (2, 700, 0.9, 0)]
    settings += [
        (1, 1, 1, 0),
        (1, 0, 1, 0.05),
        (1, 30, 0.9, 0.2),
        (1e-30, 0, 1, 0),
        (1, 0, 1e-6, 0),
        (1, 10**6, 0.8, 0),
    ]
    draws = _draws(*settings, seed=vocabulary)
    values = np.random.default_rng(1).normal(0, 3, (len(settings), vocabulary)).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16) if bfloat16 else values.astype(np.float16)
    exact = (bits.astype(np.uint32) << 16).view(np.float32) if bfloat16 else bits
    tokens = _sampled(bits, draws, Sampling(bfloat16, threads=256))
    np.testing.assert_array_equal(tokens[:, 0], reference.sampled(exact, draws))


def test_positions_of_one_row_are_drawn_with_its_settings_and_their_own_numbers() -> None:
    logits = np.random.default_rng(2).normal(0, 2, (2, 3, 500)).astype(np.float16)
    draws = _draws((0.9, 0, 0.9, 0), (1.2, 20, 1, 0), seed=3)
    each = draws._replace(uniform=np.random.default_rng(4).random((2, 3)).astype(np.float32))
    tokens = _sampled(logits, each, Sampling(bfloat16=False, threads=128), kept=3)
    for kept in range(3):
        wanted = reference.sampled(logits[:, kept], draws._replace(uniform=each.uniform[:, kept]))
        np.testing.assert_array_equal(tokens[:, kept], wanted)


def test_equal_logits_infinite_ones_and_those_that_are_no_numbers() -> None:
    logits = np.zeros((6, 100), np.float16)
    logits[0, 50:] = -0.0  # equal to the others, though its bits are not: top_k keeps them all
    logits[1, :99] = -np.inf
    logits[2, 7] = np.inf
    logits[3, 7] = np.nan
    logits[4] = -np.inf
    logits[5, [9, 4]] = 3
    draws = _draws((1, 3, 1, 0), (1, 0, 0.9, 0), (1, 0, 1, 0), (1, 3, 1, 0), (1, 1, 1, 0), (1, 1, 1, 0), seed=5)
    draws = draws._replace(uniform=np.full(6, 0.995, np.float32))
    assert _sampled(logits, draws, Sampling(bfloat16=False, threads=64))[:, 0].tolist() == [99, 99, -1, -1, -1, 4]


def test_tokens_are_as_frequent_as_their_weights_say() -> None:
    """The distribution, by numbers that cover [0, 1) evenly: each token's share is right to one draw and a rounding."""
    logits = np.random.default_rng(6).normal(0, 2, 60).astype(np.float16)
    count = 2000
    for temperature, top_k, top_p, min_p in [(0.8, 0, 0.9, 0.0), (1.3, 20, 1.0, 0.0), (1.0, 0, 1.0, 0.03)]:
        draws = reference.Draws(
            *(
                np.full(count, value, t)
                for value, t in ((temperature, "f4"), (top_k, "i8"), (top_p, "f4"), (min_p, "f4"))
            ),
            ((np.arange(count) + 0.5) / count).astype(np.float32),
        )
        tokens = _sampled(np.tile(logits, (count, 1)), draws, Sampling(bfloat16=False, threads=32))
        weights = reference.kept_weights(logits, temperature, top_k, top_p, min_p)
        shares = np.bincount(tokens[:, 0], minlength=60) / count
        np.testing.assert_allclose(shares, weights / weights.sum(), rtol=0, atol=1.01 / count)


def test_what_a_variant_cannot_do() -> None:
    assert Linear(4096, 8).is_valid
    assert not Linear(4096, 8, warps=32).is_valid  # more warps than steps of K
    assert not Linear(4096, 8, epilogue=GATED, row_tiles=1).is_valid  # no pairs of gate and value
    assert not Linear(14336, 8, 16, norm=True).is_valid  # more of x than shared memory holds
    assert Linear(4096, 8, epilogue=STORE).grid(32002, 132) == (2001, 1, 1)


class DequantizeArguments(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("out", "data", "scales")), ("blocks", ctypes.c_longlong)]


class GateArguments(ctypes.Structure):
    _fields_ = [("out", ctypes.c_void_p), ("x", ctypes.c_void_p), ("rows", ctypes.c_int), ("width", ctypes.c_int)]


def test_weights_are_dequantized_for_products_of_many_rows() -> None:
    random = np.random.default_rng(1)
    data = random.integers(0, 256, (37, 96)).astype(np.uint8)
    scales = (random.random((37, 3)) * 3e-4 + 1e-4).astype(np.float16)
    out = np.full(data.size + 64, np.nan, np.float16)
    arguments = DequantizeArguments(*map(_address, (out, data, scales)), scales.size)
    grid = -(-scales.size * 4 // 256)
    compiler.emulated("dense.cu", {}).emulate_dequantize(ctypes.byref(arguments), ctypes.c_uint(grid))
    expected = reference.dequantized(data, scales).astype(np.float16)
    assert np.array_equal(out[: data.size].reshape(data.shape), expected)
    assert np.isnan(out[data.size :]).all()


def test_gates_and_values_of_many_rows_become_their_products() -> None:
    rows, width = 21, 40
    x = np.random.default_rng(2).standard_normal((rows, 2 * width)).astype(np.float16)
    out = np.full(rows * width + 64, np.nan, np.float16)
    arguments = GateArguments(_address(out), _address(x), rows, width)
    grid = -(-rows * width // 8 // 256)
    compiler.emulated("dense.cu", {}).emulate_gate(ctypes.byref(arguments), ctypes.c_uint(grid))
    gate, value = np.split(x.astype(np.float64), 2, axis=1)
    expected = gate / (1 + np.exp(-gate)) * value
    assert reference.relative_error(out[: rows * width].reshape(rows, width), expected) < LIMIT
    assert np.isnan(out[rows * width :]).all()
