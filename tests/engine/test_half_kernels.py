"""Products of 16-bit weights against NumPy, on every instruction set at hand."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from kernel_models import HALF_INSTRUCTION_SETS, session
from numpy.typing import NDArray

from starling.engine.kernels import kernel_library

pytestmark = pytest.mark.skipif(kernel_library() is None, reason="the CPU kernels are not built on this machine")

Floats = NDArray[np.float32]
TYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@pytest.fixture(params=HALF_INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What this processor can do at best, and what older ones would take."""
    if request.param != "best":
        monkeypatch.setenv("STARLING_CPU_ISA", request.param)
    return str(request.param)


@dataclass(frozen=True)
class Linear:
    """A projection with random weights, stored [rows, columns] or transposed, and what NumPy says of it."""

    weight: NDArray[Any]
    options: dict[str, Floats]
    gated: bool = False
    transposed: bool = False

    @staticmethod
    def random(rows: int, columns: int, kind: str, **options: Any) -> "Linear":
        flags = {name: options.pop(name) for name in ("gated", "transposed") if name in options}
        weight = _random(rows, columns, seed=rows * columns) / np.sqrt(columns)
        return Linear(weight.astype(TYPES[kind]), options, **flags)

    def __call__(self, x: Floats, threads: int = 2) -> Floats:
        names = [name if name in self.options else "" for name in ("norm_weight", "bias", "residual")]
        fed = {"x": x} | {name: value for name, value in self.options.items() if name == "residual"}
        weights = {name: value for name, value in self.options.items() if name != "residual"}
        stored = self.weight.T if self.transposed else self.weight
        running = session(
            "HalfLinear",
            "starling",
            ["x", "weight", *names],
            ["y"],
            fed=fed,
            weights={"weight": stored, **weights},
            threads=threads,
            K=self.weight.shape[1],
            N=self.weight.shape[0],
            transposed=int(self.transposed),
            gated=int(self.gated),
            epsilon=1e-5,
        )
        return np.asarray(running.run(None, fed)[0])

    def expected(self, x: Floats) -> Floats:
        """In float64, from the weights as they are stored."""
        values = x.astype(np.float64)
        if "norm_weight" in self.options:
            values = values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-5) * self.options["norm_weight"]
        y = values @ self.weight.astype(np.float64).T + self.options.get("bias", np.zeros(1))
        if self.gated:
            gate, value = np.split(y, 2, axis=-1)
            y = gate / (1 + np.exp(-gate)) * value
        return np.asarray(y + self.options.get("residual", np.zeros(1)), np.float32)


def _random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", TYPES)
class TestHalfLinear:
    @pytest.mark.parametrize("tokens", [1, 2, 5, 7, 8, 9, 16, 23, 150, 300])
    @pytest.mark.parametrize(("rows", "columns"), [(96, 64), (40, 96), (17, 50), (1, 32), (33, 1)])
    def test_is_the_product_of_float32_rows(self, kind: str, rows: int, columns: int, tokens: int) -> None:
        linear, x = Linear.random(rows, columns, kind), _random(1, tokens, columns)
        np.testing.assert_allclose(linear(x), linear.expected(x), atol=3e-5)

    @pytest.mark.parametrize("tokens", [1, 3, 9, 30])
    @pytest.mark.parametrize("gated", [False, True])
    @pytest.mark.parametrize("transposed", [False, True])
    def test_takes_in_norm_bias_gate_and_residual(self, kind: str, transposed: bool, gated: bool, tokens: int) -> None:
        rows, columns = 144, 96
        linear = Linear.random(
            rows,
            columns,
            kind,
            gated=gated,
            transposed=transposed,
            norm_weight=_random(columns, seed=1),
            bias=_random(rows, seed=2),
            residual=_random(1, tokens, rows // 2 if gated else rows, seed=3),
        )
        x = 5 * _random(1, tokens, columns)
        np.testing.assert_allclose(linear(x), linear.expected(x), rtol=1e-4, atol=1e-4)

    def test_a_row_has_the_same_bits_alone_and_in_company_on_one_thread_and_on_many(self, kind: str) -> None:
        linear, x = Linear.random(96, 200, kind), _random(150, 1, 200)
        together = linear(x)
        for threads in (1, 4):
            np.testing.assert_array_equal(linear(x, threads), together)
        for row in range(0, 150, 7):
            np.testing.assert_array_equal(linear(x[row : row + 1]), together[row : row + 1])
        for first, last in ((0, 5), (5, 18), (18, 150)):
            np.testing.assert_array_equal(linear(x[first:last]), together[first:last])

    @pytest.mark.parametrize("tokens", [6, 64])
    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("normed", [False, True])
    def test_a_value_that_is_not_finite_stays_in_its_own_row(
        self, kind: str, normed: bool, bad: float, tokens: int
    ) -> None:
        options = {"norm_weight": np.ones(64, np.float32)} if normed else {}
        linear = Linear.random(32, 64, kind, **options)
        x = _random(tokens, 1, 64)
        clean = linear(x)
        for row in range(0, tokens, 2):
            x[row, 0, row] = bad
        dirty = linear(x)
        assert not np.isfinite(dirty[::2]).any()
        np.testing.assert_array_equal(dirty[1::2], clean[1::2])

    def test_every_finite_weight_is_taken_as_it_is(self, kind: str) -> None:
        """One input at a time, so that each output is a weight."""
        bits = np.arange(2**16, dtype=np.uint16)
        bits = bits[np.isfinite(bits.view(TYPES[kind]).astype(np.float32))]
        normal = np.abs(bits.view(TYPES[kind]).astype(np.float32)) >= np.finfo(np.float32).tiny
        bits = bits[normal][: normal.sum() // 64 * 64]  # a subnormal number may be taken for zero
        linear = Linear(bits.view(TYPES[kind]).reshape(-1, 64), {})
        x = np.eye(64, dtype=np.float32)[:, None]
        np.testing.assert_array_equal(linear(x)[:, 0].T, linear.weight.astype(np.float32))

    def test_zeros_give_zeros(self, kind: str) -> None:
        assert not Linear.random(32, 64, kind)(np.zeros((1, 2, 64), np.float32)).any()

    def test_refuses_input_and_weights_of_another_shape(self, kind: str) -> None:
        names, fed = ["x", "weight", "", "", ""], {"x": _random(1, 1, 96)}
        known = {"K": 64, "N": 32, "transposed": 0, "gated": 0, "epsilon": 0.0}
        weights = {"weight": np.zeros((32, 64), TYPES[kind])}
        running = session("HalfLinear", "starling", names, ["y"], fed=fed, weights=weights, **known)
        with pytest.raises(Exception, match="x's last axis is not K"):
            running.run(None, fed)
        with pytest.raises(Exception, match="the weights do not have the shape that K and N say"):
            session("HalfLinear", "starling", names, ["y"], fed=fed, weights=weights, **known | {"transposed": 1})
