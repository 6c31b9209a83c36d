"""Quantized weights on disk, from the calibration that makes them until the weight file takes them."""

from pathlib import Path

import numpy as np
import torch

from starling.export.quantization.blocks import QuantizedRows


class BlockStore:
    """Quantized matrices by the name of the checkpoint's tensor, and of a tensor of experts by the expert's number.

    A model's 4 bits a weight are more than an export may hold in memory. `folder` must be there, and empty.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[str, int], Path] = {}
        self._count = 0

    def put(self, name: str, rows: QuantizedRows, expert: int = 0) -> None:
        """Keep a matrix."""
        file = self._folder / f"{self._count}.npz"
        self._count += 1
        np.savez(file, *(piece.numpy() for piece in rows))
        self._files[name, expert] = file

    def take(self, name: str, expert: int = 0) -> QuantizedRows | None:
        """The matrix, which is not kept any longer; None where there is none."""
        file = self._files.pop((name, expert), None)
        if file is None:
            return None
        with np.load(file) as pieces:
            rows = QuantizedRows(*(torch.from_numpy(pieces[f"arr_{i}"]) for i in range(3)))
        file.unlink()
        return rows
