"""The CPU kernels against NumPy and ONNX Runtime's own operators, on every instruction set that this machine has."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_models import INSTRUCTION_SETS, run_in_place, session
from numpy.typing import NDArray
from onnx import helper

from starling.engine.engine import Engine
from starling.engine.kernels import KernelsUnavailable, kernel_library, require_kernel_library

pytestmark = pytest.mark.skipif(kernel_library() is None, reason="the CPU kernels are not built on this machine")

Floats = NDArray[np.float32]
CACHE_TYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What this processor can do at best, and what others would take."""
    if request.param == "avx-vnni" and not _has_avx_vnni():
        pytest.skip("this processor has no AVX-VNNI")
    if request.param != "best":
        monkeypatch.setenv("STARLING_CPU_ISA", request.param)
    return str(request.param)


def _has_avx_vnni() -> bool:
    return "avx_vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8").split()


@dataclass(frozen=True)
class Linear:
    """A projection with random weights, and what NumPy says of it."""

    data: NDArray[np.uint8]
    scales: Floats
    options: dict[str, Floats]
    gated: bool
    planes: int
    bits: int = 8
    zero_points: NDArray[np.uint8] | None = None

    @staticmethod
    def random(
        rows: int,
        columns: int,
        *,
        weights: "Weights" = (8, False),
        gated: bool = False,
        planes: int = 1,
        **options: Floats,
    ) -> "Linear":
        """`weights`: their bits, and whether each block has a zero point of its own."""
        generator = np.random.default_rng(rows * columns)
        bits, has_zero_points = weights
        blocks = -(-columns // 32)
        data = generator.integers(0, 2**bits, (rows, blocks, 32), dtype=np.uint8)
        scales = generator.uniform(0.5, 2, (rows, blocks)).astype(np.float16).astype(np.float32) / 2 ** (bits - 1)
        zero_points = generator.integers(0, 2**bits, (rows, blocks), dtype=np.uint8) if has_zero_points else None
        return Linear(data, scales, options, gated, planes, bits, zero_points)

    def weight(self, columns: int) -> NDArray[np.float64]:
        """[rows, columns]"""
        zero: Any = 2 ** (self.bits - 1) if self.zero_points is None else self.zero_points[..., None].astype(np.float64)
        weight = (self.data.astype(np.float64) - zero) * self.scales[..., None]
        return np.asarray(weight.reshape(len(self.data), -1)[:, :columns])

    def __call__(self, x: Floats, threads: int = 2) -> Floats:
        rows, columns = len(self.data), x.shape[-1]
        names = [name if name in self.options else "" for name in ("norm_weight", "bias", "residual")]
        fed = {"x": x} | {name: value for name, value in self.options.items() if name == "residual"}
        data = self.data if self.bits == 8 else nibbles(self.data)
        weights: dict[str, NDArray[Any]] = {"data": data, "scales": self.scales}
        weights |= {name: value for name, value in self.options.items() if name != "residual"}
        if self.zero_points is not None:
            names.append("zero_points")
            weights["zero_points"] = nibbles(self.zero_points)
        running = session(
            "QuantizedLinear",
            "starling",
            ["x", "data", "scales", *names],
            ["y"],
            fed=fed,
            weights=weights,
            threads=threads,
            K=columns,
            N=rows,
            bits=self.bits,
            block_size=32,
            planes=self.planes,
            gated=int(self.gated),
            epsilon=1e-5,
        )
        return np.asarray(running.run(None, fed)[0])

    def expected(self, x: Floats) -> Floats:
        """In float64, with activations rounded block by block as the kernel rounds them."""
        weight, values = self.weight(x.shape[-1]), x.astype(np.float64)
        if "norm_weight" in self.options:
            values = values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-5) * self.options["norm_weight"]
        rounded = np.zeros_like(values)
        for _ in range(self.planes):
            rounded += _rounded(values - rounded)
        y = rounded @ weight.T
        y = y + self.options.get("bias", np.zeros(1))
        if self.gated:
            gate, value = np.split(y, 2, axis=-1)
            y = gate / (1 + np.exp(-gate)) * value
        return np.asarray(y + self.options.get("residual", np.zeros(1)), np.float32)


#: Bits, and whether there are zero points.
Weights = tuple[int, bool]
WEIGHTS: list[Weights] = [(8, False), (4, False), (4, True)]


def nibbles(numbers: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two numbers of the last axis per byte, the first in the low nibble."""
    even = np.pad(numbers, [(0, 0)] * (numbers.ndim - 1) + [(0, numbers.shape[-1] % 2)])
    return np.asarray(even[..., 0::2] | even[..., 1::2] << 4)


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    columns = values.shape[-1]
    padded = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, -columns % 32)])
    blocks = padded.reshape(*values.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    steps = np.round(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (steps * scale).reshape(padded.shape)[..., :columns]


def _random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.usefixtures("instruction_set")
class TestQuantizedLinear:
    @pytest.mark.parametrize("tokens", [1, 2, 5, 7, 100, 201])
    @pytest.mark.parametrize(("rows", "columns"), [(96, 64), (40, 96), (17, 50), (1, 32)])
    @pytest.mark.parametrize("weights", WEIGHTS, ids=str)
    def test_is_the_product_with_activations_rounded_in_blocks(
        self, weights: Weights, rows: int, columns: int, tokens: int
    ) -> None:
        linear, x = Linear.random(rows, columns, weights=weights), _random(1, tokens, columns)
        np.testing.assert_allclose(linear(x), linear.expected(x), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("tokens", [1, 3, 9])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("weights", WEIGHTS, ids=str)
    def test_takes_in_norm_bias_gate_and_residual(self, weights: Weights, gated: bool, tokens: int) -> None:
        rows, columns = 144, 96
        linear = Linear.random(
            rows,
            columns,
            weights=weights,
            gated=gated,
            norm_weight=_random(columns, seed=1) / 8,
            bias=_random(rows, seed=2),
            residual=_random(1, tokens, rows // 2 if gated else rows, seed=3),
        )
        x = 5 * _random(1, tokens, columns)
        np.testing.assert_allclose(linear(x), linear.expected(x), rtol=2e-3, atol=2e-3)

    @pytest.mark.parametrize("tokens", [1, 2, 4, 5])
    @pytest.mark.parametrize("weights", WEIGHTS, ids=str)
    def test_a_second_plane_rounds_a_hundred_times_finer(self, weights: Weights, tokens: int) -> None:
        x = _random(1, tokens, 128)
        errors = []
        for planes in (1, 2):
            linear = Linear.random(64, 128, weights=weights, planes=planes)
            np.testing.assert_allclose(linear(x), linear.expected(x), rtol=1e-4, atol=1e-3)
            errors.append(np.abs(linear(x) - x @ linear.weight(128).T).max())
        assert errors[1] < errors[0] / 100

    @pytest.mark.parametrize("planes", [1, 2])
    @pytest.mark.parametrize("weights", WEIGHTS, ids=str)
    def test_a_row_has_the_same_bits_alone_and_in_company_on_one_thread_and_on_many(
        self, weights: Weights, planes: int
    ) -> None:
        linear, x = Linear.random(96, 64, weights=weights, planes=planes), _random(13, 1, 64)
        together = linear(x)
        for threads in (1, 4):
            np.testing.assert_array_equal(linear(x, threads), together)
        for row in range(13):
            np.testing.assert_array_equal(linear(x[row : row + 1]), together[row : row + 1])

    @pytest.mark.parametrize("planes", [1, 2])
    @pytest.mark.parametrize("weights", WEIGHTS, ids=str)
    def test_many_rows_have_the_same_bits_however_they_are_cut(self, weights: Weights, planes: int) -> None:
        """So many that they are multiplied another way than few, with some left over."""
        linear, x = Linear.random(72, 200, weights=weights, planes=planes), _random(149, 1, 200)
        together = linear(x)
        for first, last in ((0, 5), (5, 30), (30, 149), (148, 149)):
            np.testing.assert_array_equal(linear(x[first:last]), together[first:last])

    @pytest.mark.parametrize("weights", WEIGHTS, ids=str)
    def test_the_greatest_numbers_do_not_overflow(self, weights: Weights) -> None:
        linear, x = Linear.random(64, 96, weights=weights), np.ones((1, 31, 96), np.float32)
        for number in (0, 2**linear.bits - 1):
            linear.data[...] = number
            for sign in (1, -1):
                np.testing.assert_allclose(linear(sign * x), linear.expected(sign * x), rtol=1e-5)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("planes", [1, 2])
    @pytest.mark.parametrize("normed", [False, True])
    def test_a_value_that_is_not_finite_makes_its_own_row_none(self, normed: bool, planes: int, bad: float) -> None:
        options = {"norm_weight": np.ones(64, np.float32)} if normed else {}
        linear = Linear.random(32, 64, planes=planes, **options)
        x = _random(64, 1, 64)
        clean = linear(x)
        for row in range(0, 64, 2):  # at every other channel, in a row of its own
            x[row, 0, row] = bad
        dirty = linear(x)
        assert np.isnan(dirty[::2]).all()
        np.testing.assert_array_equal(dirty[1::2], clean[1::2])

    @pytest.mark.parametrize("planes", [1, 2])
    def test_magnitudes_too_small_to_divide_by_are_zero(self, planes: int) -> None:
        y = Linear.random(32, 64, planes=planes)(np.full((1, 1, 64), 1e-38, np.float32))
        assert np.abs(y).max() < 1e-35

    def test_zeros_give_zeros(self) -> None:
        assert not Linear.random(32, 64)(np.zeros((1, 2, 64), np.float32)).any()

    def test_the_weights_of_a_block_are_the_same_on_every_instruction_set(
        self, instruction_set: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x = _random(1, 5, 96)
        for weights in WEIGHTS:
            linear = Linear.random(64, 96, weights=weights)
            ours = linear(x)
            with monkeypatch.context() as patch:
                patch.delenv("STARLING_CPU_ISA", raising=False)
                np.testing.assert_array_equal(linear(x), ours)

    def test_refuses_zero_points_that_are_fed(self) -> None:
        fed = {"x": _random(1, 1, 64), "zero_points": np.zeros((32, 1), np.uint8)}
        weights = {"data": np.zeros((32, 2, 16), np.uint8), "scales": np.ones((32, 2), np.float32)}
        names = ["x", "data", "scales", "", "", "", "zero_points"]
        known = {"K": 64, "N": 32, "bits": 4, "block_size": 32, "planes": 1, "gated": 0, "epsilon": 0.0}
        running = session("QuantizedLinear", "starling", names, ["y"], fed=fed, weights=weights, **known)
        with pytest.raises(Exception, match="the zero points are no initializer"):
            running.run(None, fed)

    def test_refuses_a_scale_that_two_bytes_cannot_hold(self) -> None:
        linear = Linear.random(32, 64)
        linear.scales[3, 1] = 0.1
        with pytest.raises(Exception, match="a scale is not a float16: export the model again"):
            linear(_random(1, 1, 64))

    def test_refuses_input_of_another_width(self) -> None:
        weights = {"data": np.zeros((32, 2, 32), np.uint8), "scales": np.ones((32, 2), np.float32)}
        names = ["x", "data", "scales", "", "", ""]
        known = {"K": 64, "N": 32, "bits": 8, "block_size": 32, "planes": 1, "gated": 0, "epsilon": 0.0}
        fed = {"x": _random(1, 1, 96)}
        running = session("QuantizedLinear", "starling", names, ["y"], fed=fed, weights=weights, **known)
        with pytest.raises(Exception, match="x's last axis is not K"):
            running.run(None, fed)


@dataclass(frozen=True)
class Attention:
    """A shape of attention, and a cache that both sides of a comparison start from."""

    heads: int
    kv_heads: int
    head_dim: int
    positions: int = 400
    window: int = -1
    rotated: int | None = None
    interleaved: bool = False

    def outputs(
        self,
        domain: str,
        steps: list[tuple[int, list[int]]],
        *,
        reduced: bool = False,
        threads: int = 2,
        cache_type: str = "float32",
        spoil: tuple[int, int, slice] | None = None,
    ) -> list[Floats]:
        """Outputs of steps of (tokens, positions before them by row), one after the other on one cache.

        `spoil`: step, row and columns of its input that are not a number.
        """
        running, cache = self._opened(domain, len(steps[0][1]), reduced=reduced, threads=threads, cache=cache_type)
        found = []
        for index, (tokens, before) in enumerate(steps):
            ends = np.array(before, np.int32) + tokens
            query = np.stack([_token_rows(start, tokens, self._width) for start in before])
            if spoil is not None and spoil[0] == index:
                query[spoil[1], :, spoil[2]] = np.nan
            step = {"query": query, "lengths": ends - 1, "total": np.array(ends.max(), np.int32)}
            found.append(run_in_place(running, step, cache))
        return found

    def by_parts(
        self, parts: list[tuple[int, int, int]], *, reduced: bool = False, threads: int = 2, cache_type: str = "float32"
    ) -> tuple[Floats, NDArray[Any]]:
        """Parts (row, first position, tokens) in one call, after all that is before them; output, and the keys."""
        running, cache = self._opened("starling", 5, reduced=reduced, threads=threads, cache=cache_type)
        before = [[(row, 0, start)] for row, start, _ in parts if start > 0]
        for together in (*before, parts):
            places = [(max(start, 0), tokens) for _, start, tokens in together if tokens > 0]
            query = np.concatenate([_token_rows(start, tokens, self._width) for start, tokens in places])
            lengths = np.array(together, np.int32).reshape(-1)
            step = {"query": query[None], "lengths": lengths, "total": np.array(1, np.int32)}
            output = run_in_place(running, step, cache)
        return output, cache["past_key"]

    @property
    def _width(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def _opened(
        self, domain: str, rows: int, *, reduced: bool, threads: int, cache: str
    ) -> tuple[Any, dict[str, NDArray[Any]]]:
        """The operator, and a cache of zeros."""
        kind = CACHE_TYPES[cache]
        half = (self.rotated or self.head_dim) // 2
        angles = np.arange(self.positions)[:, None] / 100.0 ** (np.arange(half) / half)
        weights = {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
        past = {
            f"past_{side}": np.zeros((rows, self.kv_heads, self.positions, self.head_dim), kind)
            for side in ("key", "value")
        }
        attributes: dict[str, Any] = {
            "num_heads": self.heads,
            "kv_num_heads": self.kv_heads,
            "scale": 0.2,
            "local_window_size": self.window,
            "do_rotary": 1,
            "rotary_interleaved": int(self.interleaved),
        }
        if domain == "starling":
            attributes["reduced_precision"] = int(reduced)
        names = ["query", "", "", "past_key", "past_value", "lengths", "total", "cos", "sin"]
        outputs = ["output", "present_key", "present_value"]
        fed = {"query": _random(1, 1, 1), **past, "lengths": np.zeros(1, np.int32), "total": np.array(0, np.int32)}
        kinds = dict.fromkeys(outputs[1:], helper.np_dtype_to_tensor_dtype(kind))
        running = session(
            "GroupQueryAttention",
            domain,
            names,
            outputs,
            fed=fed,
            weights=weights,
            threads=threads,
            output_types=kinds,
            **attributes,
        )
        return running, past


def _token_rows(start: int, tokens: int, width: int) -> Floats:
    """The same numbers for the same positions, however they are cut."""
    return np.stack([_random(width, seed=position) for position in range(start, start + tokens)])


SHAPES = [
    Attention(heads=9, kv_heads=3, head_dim=64),
    Attention(heads=4, kv_heads=4, head_dim=16),
    Attention(heads=8, kv_heads=1, head_dim=128),
    Attention(heads=4, kv_heads=2, head_dim=96, rotated=48),
    Attention(heads=4, kv_heads=2, head_dim=32, interleaved=True),
    Attention(heads=4, kv_heads=2, head_dim=64, window=70),
    Attention(heads=4, kv_heads=2, head_dim=80, window=1),
]


@pytest.mark.usefixtures("instruction_set")
class TestGroupQueryAttention:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_is_onnx_runtimes_in_prefill_chunks_and_decode(self, shape: Attention) -> None:
        steps = [(200, [0]), (33, [200]), (2, [233]), *((1, [235 + i]) for i in range(3))]
        for ours, theirs in zip(shape.outputs("starling", steps), shape.outputs("com.microsoft", steps), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_rows_of_different_lengths_decode_together(self, shape: Attention) -> None:
        steps = [(40, [0, 0, 0]), (1, [40, 17, 5]), (1, [41, 18, 6])]
        for ours, theirs in zip(shape.outputs("starling", steps), shape.outputs("com.microsoft", steps), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)

    @pytest.mark.parametrize("cache", CACHE_TYPES)
    @pytest.mark.parametrize("reduced", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_parts_of_several_rows_are_as_each_alone(self, shape: Attention, reduced: bool, cache: str) -> None:
        """A token of one row, a long piece and a short one of others, in one call, with a row between that has none."""
        parts = [(0, 37, 1), (1, 5, 60), (3, 130, 4), (4, 0, 1)]
        for threads in (1, 3):
            together, keys = shape.by_parts(parts, reduced=reduced, threads=threads, cache_type=cache)
            first = 0
            for row, start, tokens in parts:
                steps = [(start, [0]), (tokens, [start])] if start else [(tokens, [0])]
                alone = shape.outputs("starling", steps, reduced=reduced, cache_type=cache)[-1]
                np.testing.assert_array_equal(together[0, first : first + tokens], alone[0])
                assert keys[row, :, : start + tokens].any(axis=(0, 2)).all()
                assert not keys[row, :, start + tokens :].any()
                first += tokens
            assert not keys[2].any()

    @pytest.mark.parametrize(
        "parts",
        [
            [(0, 0, 2), (0, 2, 1)],
            [(1, 0, 2), (0, 0, 1)],
            [(0, 0, 2), (5, 0, 1)],
            [(0, 0, 2), (1, 399, 2)],
            [(0, 0, 2), (1, -1, 2)],
            [(0, 0, 5), (1, 0, -2)],
        ],
        ids=str,
    )
    def test_parts_that_do_not_fit_are_refused(self, parts: list[tuple[int, int, int]]) -> None:
        with pytest.raises(Exception, match="seqlens_k"):
            SHAPES[0].by_parts(parts)

    @pytest.mark.parametrize("cache", CACHE_TYPES)
    @pytest.mark.parametrize("reduced", [False, True])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_how_a_prompt_is_cut_and_shared_out_changes_no_bit(
        self, shape: Attention, reduced: bool, cache: str
    ) -> None:
        whole = shape.outputs("starling", [(300, [0])], reduced=reduced, cache_type=cache)[0]
        cuts = [(1, [0]), (150, [1]), (5, [151]), *((1, [156 + i]) for i in range(10)), (134, [166])]
        for threads in (1, 3):
            pieces = shape.outputs("starling", cuts, reduced=reduced, threads=threads, cache_type=cache)
            np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_products_of_bfloat16_are_within_their_rounding(self, shape: Attention) -> None:
        steps = [(100, [0]), (1, [100])]
        for ours, exact in zip(
            shape.outputs("starling", steps, reduced=True), shape.outputs("starling", steps), strict=True
        ):
            assert np.abs(ours - exact).max() < 0.05
            assert np.abs(ours - exact).mean() < 0.004

    @pytest.mark.parametrize(("cache", "most", "mean"), [("float16", 0.008, 0.0004), ("bfloat16", 0.06, 0.003)])
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_a_cache_of_16_bits_is_within_its_rounding(
        self, shape: Attention, cache: str, most: float, mean: float
    ) -> None:
        steps = [(100, [0]), (33, [100]), (1, [133])]
        for ours, exact in zip(
            shape.outputs("starling", steps, cache_type=cache), shape.outputs("com.microsoft", steps), strict=True
        ):
            assert np.abs(ours - exact).max() < most
            assert np.abs(ours - exact).mean() < mean

    @pytest.mark.parametrize("reduced", [False, True])
    @pytest.mark.parametrize("part", ["query", "key", "value"])
    def test_a_token_that_is_not_finite_shows_and_harms_no_other_sequence(self, part: str, reduced: bool) -> None:
        shape = SHAPES[0]
        head = {"query": 0, "key": shape.heads, "value": shape.heads + shape.kv_heads}[part]
        columns = slice(head * shape.head_dim, head * shape.head_dim + shape.head_dim)
        steps = [(1, [i, i]) for i in range(3)]
        clean = shape.outputs("starling", steps, reduced=reduced)
        dirty = shape.outputs("starling", steps, reduced=reduced, spoil=(2, 0, columns))
        assert np.isnan(dirty[2][0, 0, : shape.head_dim]).all()
        np.testing.assert_array_equal(dirty[2][1], clean[2][1])

    def test_a_chunk_without_any_finite_score_is_not_passed_over(self) -> None:
        shape = Attention(heads=1, kv_heads=1, head_dim=16)
        keys = slice(shape.head_dim, 2 * shape.head_dim)
        steps = [(128, [0]), (128, [128]), (20, [256]), (1, [276])]
        first, _, third, last = shape.outputs("starling", steps, spoil=(1, 0, keys))
        assert np.isfinite(first).all()
        assert np.isnan(third).all()
        assert np.isnan(last).all()

    def test_refuses_positions_outside_the_cache(self) -> None:
        with pytest.raises(Exception, match="seqlens_k lies outside the cache"):
            SHAPES[0].outputs("starling", [(1, [400])])


@pytest.fixture(scope="module")
def engine(demo_int8_bundle: Path) -> Iterator[Engine]:
    """SmolLM2 int8 on the kernels."""
    with Engine(demo_int8_bundle, max_seq=256, max_batch=4) as engine:
        yield engine


class TestInTheEngine:
    PROMPT = "The three primary colours are"

    def test_an_int8_bundle_runs_on_them(self, engine: Engine) -> None:
        assert engine.backend.kernels == require_kernel_library().instruction_set  # type: ignore[attr-defined]

    def test_greedy_text_is_the_same_alone_and_in_company(self, engine: Engine) -> None:
        prompts = [self.PROMPT, "Water boils at", "In the year 1969,", "A prime number is a number that"]
        alone = [engine.generate(prompt, max_tokens=24).tokens for prompt in prompts]
        assert [result.tokens for result in engine.generate(prompts, max_tokens=24)] == alone

    def test_speculation_changes_no_token(self, demo_int8_bundle: Path, engine: Engine) -> None:
        text = "def add(a, b):\n    return a + b\n\n\ndef add(a, b):\n    return"
        plain = engine.generate(text, max_tokens=48, ignore_eos=True)
        with Engine(demo_int8_bundle, max_seq=256, speculation="prompt-lookup") as speculating:
            drafted = speculating.generate(text, max_tokens=48, ignore_eos=True)
        assert drafted.tokens == plain.tokens
        assert drafted.timings.accepted_tokens > 0

    def test_without_them_the_plain_graph_says_nearly_the_same(
        self, demo_int8_bundle: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("STARLING_CPU_KERNELS", "0")
        with Engine(demo_int8_bundle, max_seq=256) as plain:
            assert plain.backend.kernels is None  # type: ignore[attr-defined]
            tokens = np.array(plain.tokenizer.encode(self.PROMPT), np.int64)
            theirs = plain.backend.prefill(0, tokens, 0).logits()[0].copy()
        ours = engine.backend.prefill(0, tokens, 0).logits()[0]
        assert np.abs(ours - theirs).max() < 2
        assert np.corrcoef(ours, theirs)[0, 1] > 0.99

    @pytest.mark.parametrize(("switch", "kernels"), [(None, "avx2"), ("0", None)])
    def test_with_avx2_alone_they_run_it_unless_switched_off(
        self, demo_int8_bundle: Path, switch: str | None, kernels: str | None
    ) -> None:
        environment = {"STARLING_CPU_ISA": "avx2"} | ({} if switch is None else {"STARLING_CPU_KERNELS": switch})
        document = opened_kernels(demo_int8_bundle, environment)
        assert document["kernels"] == kernels
        assert kernels is not None or "switched off" in str(document["note"])

    def test_switched_off_they_say_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(os.environ, "STARLING_CPU_KERNELS", "0")
        with pytest.raises(KernelsUnavailable, match="switched off by STARLING_CPU_KERNELS=0"):
            require_kernel_library()


def opened_kernels(bundle: Path, environment: dict[str, str]) -> dict[str, str | None]:
    """What an engine in a process of its own says of its kernels: the library looks at the processor once."""
    code = (
        "import json, sys; from starling.engine import Engine; backend = Engine(sys.argv[1], max_seq=64).backend; "
        "print(json.dumps({'kernels': backend.kernels, 'note': backend.kernels_note}))"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STARLING_CPU")}
    command = [sys.executable, "-c", code, str(bundle)]
    output = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout
    document: dict[str, str | None] = json.loads(output)
    return document
