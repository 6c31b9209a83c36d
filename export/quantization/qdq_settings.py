"""Which schemes a dialect has, and what can be asked of explicit quantization for TensorRT. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starling.engine.errors import UserError
from starling.engine.names import ACTIVATION_SCHEMES, SCHEMES_OF
from starling.export.quantization.blocks import BLOCK_SIZES

if TYPE_CHECKING:
    from starling.export.quantization.qdq_scheme import Grid

DEFAULT_SMOOTHING = 0.8  # see profiling/results/quality-w8a8-smollm2.json
_INT4_BLOCK = 128


def check_scheme(scheme: str, dialect: str) -> None:
    """Raise UserError where the dialect has no operators for this quantization."""
    known = SCHEMES_OF[dialect]
    if not known:
        raise UserError(f"dialect {dialect} is full precision only; use --dialect ort or tensorrt with --quant")
    if scheme not in known:
        raise UserError(f"--quant {scheme} is for --dialect tensorrt; dialect {dialect} has {', '.join(known)}")


@dataclass(frozen=True, slots=True)
class QdqQuantization:
    """Which numbers are quantized, and how finely.

    `block_size` None: one scale per output channel, else one per so many neighbouring inputs of it. `head` quantizes
    lm_head too. `smoothing` is SmoothQuant's alpha, 0 for none. `keep` are patterns of weight names that stay in the
    model's dtype; None leaves the choice to the export (where activations are quantized).
    """

    scheme: str
    block_size: int | None = None
    head: bool = False
    smoothing: float | None = None
    keep: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Fill in the scheme's defaults. Raises UserError where settings do not go together."""
        if self.scheme not in SCHEMES_OF["tensorrt"]:
            known = ", ".join(sorted(SCHEMES_OF["tensorrt"]))
            raise UserError(f"unknown quantization {self.scheme!r}; known are {known}")
        if self.block_size is not None and self.block_size not in BLOCK_SIZES:
            raise UserError(f"block size {self.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}")
        if self.quantizes_activations and self.block_size is not None:
            raise UserError(f"{self.scheme} has one scale per output channel: leave --block-size out")
        if not self.quantizes_activations and self.smoothing is not None:
            raise UserError(f"smoothing is about quantized activations: {self.scheme} has none, use w8a8 or fp8")
        if self.smoothing is not None and not 0 <= self.smoothing <= 1:
            raise UserError(f"smoothing {self.smoothing:g} is not between 0 (none) and 1")
        if self.scheme == "int4" and self.block_size is None:
            object.__setattr__(self, "block_size", _INT4_BLOCK)
        if self.quantizes_activations:
            smoothing = DEFAULT_SMOOTHING if self.smoothing is None else float(self.smoothing)
            object.__setattr__(self, "smoothing", smoothing)

    @property
    def quantizes_activations(self) -> bool:
        """Whether the projections' inputs are rounded too."""
        return self.scheme in ACTIVATION_SCHEMES

    @property
    def weights(self) -> Grid:
        """What weights are rounded to."""
        from starling.export.quantization.qdq_scheme import WEIGHT_GRIDS  # with PyTorch

        return WEIGHT_GRIDS[self.scheme]

    @property
    def activations(self) -> Grid | None:
        """What the projections' inputs are rounded to; None where they stay in the model's dtype."""
        from starling.export.quantization.qdq_scheme import ACTIVATION_GRIDS

        return ACTIVATION_GRIDS.get(self.scheme)

    def block_for(self, columns: int) -> int | None:
        """The block size for a weight of so many inputs: TensorRT wants whole blocks, so it may be a smaller one.

        Raises UserError where not even the smallest block divides the width.
        """
        if self.block_size is None:
            return None
        fitting = [size for size in BLOCK_SIZES if size <= self.block_size and columns % size == 0]
        if not fitting:
            raise UserError(f"a weight is {columns} wide, which no block of {BLOCK_SIZES[0]} divides: use --quant int8")
        return fitting[-1]

    def to_json(self) -> dict[str, Any]:
        """The `quantization` object of bundle.json, without what the export finds out."""
        return {
            "scheme": self.scheme,
            "block_size": self.block_size,
            "symmetric": True,
            "accuracy_level": None,
            "head": self.head,
            "smoothing": self.smoothing,
        }
