"""GPTQ (Frantar et al., 2022): each column of weights is rounded with the errors of the columns before it in mind.

What is made small is the error of a projection's outputs over a text, tr(E H E^T) with E the error of the weights and
H = X^T X of the inputs X. With H = U D U^T, U unit upper triangular and D diagonal, it is the sum over columns j of
D_j |(E U)_j|^2, and (E U)_j is the error of rounding weight j plus what the columns before it have left. This is LDLQ
(Chee et al., 2023), which gives GPTQ's numbers without an inverse of H.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from starling.export.quantization.block_search import quantized, search_grid
from starling.export.quantization.blocks import BlockQuantization, QuantizedRows, pack_blocks

DAMPING = 0.1  # of the mean of H's diagonal, added to it: the text is a sample
_MOST_DAMPING = 10.0
_CHUNK_ELEMENTS = 4 * 1024 * 1024  # weights that are worked on at a time: 16 MiB


@dataclass(frozen=True, slots=True)
class ErrorFeedback:
    """What H of a projection's inputs says of its columns.

    `reversed_factor` [in, in] is the lower Cholesky factor of H with both axes reversed: with both reversed again it is
    R of H = R R^T, R upper triangular, and U = R / diag(R). It stays as it is found, since a wide one takes a gigabyte.
    """

    reversed_factor: Tensor

    def powers(self, start: int, stop: int) -> Tensor:
        """The diagonal of H, float32 [stop - start]: what the squared error of a column counts alone."""
        width = len(self.reversed_factor)
        return self.reversed_factor[width - stop : width - start].square().sum(1).flip(0)

    def columns(self, first: int, start: int, stop: int) -> Tensor:
        """U[first:stop, start:stop], float32."""
        width = len(self.reversed_factor)
        part = self.reversed_factor[width - stop : width - first, width - stop : width - start]
        return part.flip(0, 1) / self._roots(start, stop)

    def _roots(self, start: int, stop: int) -> Tensor:
        width = len(self.reversed_factor)
        return self.reversed_factor.diagonal()[width - stop : width - start].flip(0)


def error_feedback(inputs: Iterable[Tensor], width: int, damping: float = DAMPING) -> ErrorFeedback:
    """Of the inputs X, in pieces [n, width] of float32. Memory: two matrices [width, width].

    Where float32 cannot factor H, `damping` grows. An input that is always zero counts as the mean one does.
    """
    hessian = torch.zeros(width, width)
    for piece in inputs:
        flipped = piece.flip(1)
        hessian.addmm_(flipped.T, flipped)
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean()) or 1.0
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    factor, failed = torch.linalg.cholesky_ex(hessian)
    while failed and damping < _MOST_DAMPING:
        diagonal += 9 * damping * mean
        damping *= 10
        factor, failed = torch.linalg.cholesky_ex(hessian)
    return ErrorFeedback(factor)


def compensate(rows: Tensor, feedback: ErrorFeedback, how: BlockQuantization) -> QuantizedRows:
    """Quantize rows float32 [n, in], which become the weights that the numbers stand for."""
    step = max(1, _CHUNK_ELEMENTS // rows.shape[1])
    with _one_thread():
        pieces = [_compensate(rows[start : start + step], feedback, how) for start in range(0, len(rows), step)]
    return QuantizedRows(*map(torch.cat, zip(*pieces, strict=True)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """A column at a time is little work: on a busy machine threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _compensate(rows: Tensor, feedback: ErrorFeedback, how: BlockQuantization) -> QuantizedRows:
    """As above; inside, a column of weights is a row, so that it is read in one piece."""
    weights = rows.T.contiguous()
    errors, codes = torch.empty_like(weights), torch.empty(weights.shape, dtype=torch.uint8)
    scales, zeros = [], []
    for start in range(0, len(weights), how.block_size):
        stop = min(start + how.block_size, len(weights))
        factor = feedback.columns(0, start, stop)
        wanted = torch.addmm(weights[start:stop], factor[:start].T, errors[:start])
        # Not D, which leaves out what the columns before can take over: grids chosen by H have the lower KL.
        importance = feedback.powers(start, stop)[:, None]
        scale, zero = search_grid(wanted, importance, how.bits, symmetric=how.is_symmetric)
        for i in range(stop - start):
            code = quantized(wanted[i], scale, zero, how.bits)
            codes[start + i] = code
            error = torch.sub(weights[start + i], code.sub_(zero).mul_(scale), out=errors[start + i])
            wanted[i + 1 :].addr_(factor[start + i, i + 1 :], error)
        scales.append(scale)
        zeros.append(zero)
    rows.copy_(weights.sub_(errors).T)
    return pack_blocks(codes.T, torch.stack(scales, dim=1), torch.stack(zeros, dim=1), how)
