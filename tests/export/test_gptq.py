"""GPTQ's numbers against the formula of its paper, and what they are for: smaller errors of a projection's outputs."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from starling.export.quantization.block_search import search_grid
from starling.export.quantization.blocks import BlockQuantization, dequantize, quantize_rows
from starling.export.quantization.gptq import compensate, error_feedback

DAMPING = 0.01


def correlated_inputs(columns: int, count: int = 400) -> Tensor:
    """Inputs [count, columns] as a model has them: few directions carry most, a few channels are much larger."""
    generator = torch.Generator().manual_seed(1)
    mixed = torch.randn(count, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    x = mixed + 0.3 * torch.randn(count, columns, generator=generator)
    x[:, 5] *= 12
    return x


def weights(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))


def gptq_of_the_paper(
    w: NDArray[np.float64], x: NDArray[np.float64], scales: NDArray[np.float64], zeros: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Frantar et al., 2022, algorithm 1 without its blocks: by the upper Cholesky factor of the inverse of H.

    `scales`, `zeros` [rows, columns]: the grid of each weight. Returns the whole numbers [rows, columns].
    """
    hessian = x.T @ x
    hessian += DAMPING * np.diag(hessian).mean() * np.eye(len(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    w, codes = w.copy(), np.empty_like(w)
    for j in range(w.shape[1]):
        codes[:, j] = np.clip(np.round(w[:, j] / scales[:, j] + zeros[:, j]), 0, 15)
        error = (w[:, j] - (codes[:, j] - zeros[:, j]) * scales[:, j]) / upper[j, j]
        w[:, j:] -= np.outer(error, upper[j, j:])
    return codes


def test_a_column_counts_by_the_power_of_its_input() -> None:
    x = correlated_inputs(80)
    power = x.double().square().sum(0)
    wanted = power + DAMPING * power.mean()
    found = error_feedback([x], 80, DAMPING)
    for start, stop in ((0, 32), (32, 64), (64, 80)):
        torch.testing.assert_close(found.powers(start, stop).double(), wanted[start:stop], rtol=1e-4, atol=0)


def nibbles(packed: Tensor) -> NDArray[np.float64]:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).numpy().astype(np.float64)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [64, 80])  # 80: a short last block
def test_the_numbers_are_those_of_the_paper(columns: int, symmetric: bool) -> None:
    how = BlockQuantization("int4", symmetric=symmetric)
    x, w = correlated_inputs(columns), weights(24, columns)
    found = compensate(w.clone(), error_feedback([x], columns, DAMPING), how)
    per_weight = found.scales.repeat_interleave(32, dim=1)[:, :columns].numpy().astype(np.float64)
    zeros = nibbles(found.zeros)[:, : found.scales.shape[1]].repeat(32, axis=1)[:, :columns]
    expected = gptq_of_the_paper(w.numpy().astype(np.float64), x.numpy().astype(np.float64), per_weight, zeros)
    same = nibbles(found.data)[:, :columns] == expected
    assert same.mean() > 0.995  # float32 against float64: a weight half-way between two numbers may go either way
    if symmetric:
        assert (zeros == 8).all()


def output_error(w: Tensor, other: Tensor, x: Tensor) -> float:
    return float(((w - other) @ x.T).square().mean() / (w @ x.T).square().mean())


@pytest.mark.parametrize("symmetric", [False, True])
def test_outputs_are_nearer_than_by_rounding(symmetric: bool) -> None:
    how = BlockQuantization("int4", symmetric=symmetric)
    x, w = correlated_inputs(96), weights(40, 96)
    rounded = dequantize(quantize_rows(w, how), how, 96)
    stood_for = w.clone()
    found = compensate(stood_for, error_feedback([x[:200], x[200:]], 96), how)
    assert torch.allclose(dequantize(found, how, 96), stood_for, atol=1e-5)
    assert output_error(w, stood_for, x) < 0.3 * output_error(w, rounded, x)


def test_an_input_that_is_always_zero_changes_nothing_for_the_others() -> None:
    how = BlockQuantization("int4")
    x, w = correlated_inputs(64), weights(8, 64)
    x[:, 40] = 0
    found = w.clone()
    compensate(found, error_feedback([x], 64), how)
    assert found.isfinite().all()
    assert output_error(w, found, x) < 0.01


def test_inputs_of_fewer_tokens_than_channels_still_have_a_factor() -> None:
    x, w = correlated_inputs(128, count=3), weights(4, 128)
    found = w.clone()
    compensate(found, error_feedback([x], 128), BlockQuantization("int4"))
    assert found.isfinite().all()
    assert (found - w).abs().max() < 1.5  # no weight runs away where no input says anything of it


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_finds_about_the_best(symmetric: bool) -> None:
    """Against every scale of a sweep of 300 and every zero point, each tried in numpy."""
    columns = weights(32, 40)
    importance = torch.rand(32, 1, generator=torch.Generator().manual_seed(3)) + 0.05
    blocks, weigh = columns.numpy().astype(np.float64), importance.numpy().astype(np.float64)

    def costs(scale: NDArray[np.float64], zero: NDArray[np.float64] | float) -> NDArray[np.float64]:
        codes = np.clip(np.round(blocks / scale + zero), 0, 15)
        return (weigh * ((codes - zero) * scale - blocks) ** 2).sum(axis=0)

    widest = np.abs(blocks).max(axis=0) / 7
    sweep = [sign * widest * share for share in np.linspace(0.3, 1.2, 300) for sign in ((1, -1) if symmetric else (1,))]
    best = np.min([costs(scale, zero) for scale in sweep for zero in ((8,) if symmetric else range(16))], axis=0)
    found = search_grid(columns, importance, 4, symmetric=symmetric)
    scale, zero = (piece.numpy().astype(np.float64) for piece in found)
    assert costs(scale, zero).sum() < 1.06 * best.sum()


def test_scales_are_values_of_float16() -> None:
    found = quantize_rows(weights(16, 64), BlockQuantization("int4"))
    assert torch.equal(found.scales, found.scales.half().float())


def test_importance_decides_which_columns_are_near() -> None:
    how, w = BlockQuantization("int4"), weights(200, 32)
    importance = torch.ones(32)
    importance[:4] = 50
    even, uneven = (dequantize(quantize_rows(w, how, weigh), how, 32) for weigh in (None, importance))
    assert (uneven - w)[:, :4].square().mean() < 0.9 * (even - w)[:, :4].square().mean()
