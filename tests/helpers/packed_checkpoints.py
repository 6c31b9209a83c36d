"""Small random models as folders with quantized weights, laid out by the definitions of their methods.

They are packed by sums of powers of two, number by number, so that the tests compare the reader with that and not with
itself; tests/data/packed_weights.safetensors has what the methods' own packages make of such tensors.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from plain_checkpoints import edit_json, write_folder
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class Whole:
    """A random weight of whole numbers: `codes` [out, in], `zeros` and `scales` [out, groups], `places` [in]."""

    codes: Tensor
    zeros: Tensor
    scales: Tensor
    places: Tensor
    bits: int

    @property
    def values(self) -> Tensor:
        """float32 [out, in]."""
        return (self.codes - self.zeros[:, self.places]).float() * self.scales.float()[:, self.places]


Parts = dict[str, Tensor]
Pack = Callable[[Whole], Parts]


def random_whole(
    shape: tuple[int, int], bits: int, group: int, *, symmetric: bool, dtype: torch.dtype, in_order: bool = True
) -> Whole:
    """Random codes; the scales are values of `dtype`."""
    outputs, inputs = shape
    groups = 1 if group == -1 else -(-inputs // group)
    middle = 2 ** (bits - 1)
    places = torch.arange(inputs) // (inputs if group == -1 else group)
    zeros = torch.full((outputs, groups), middle) if symmetric else torch.randint(1, 2**bits, (outputs, groups))
    return Whole(
        torch.randint(0, 2**bits, shape),
        zeros,
        ((torch.rand(outputs, groups) * 0.4 + 0.1) / middle).to(dtype),
        places if in_order else places[torch.randperm(inputs)],
        bits,
    )


def words(numbers: Tensor, bits: int) -> Tensor:
    """int32 [n, m] of numbers [n, m * 32 / bits], the first in the lowest bits."""
    apart = numbers.long().unflatten(1, (-1, 32 // bits))  # type: ignore[no-untyped-call]
    summed = (apart * 2 ** (bits * torch.arange(32 // bits))).sum(-1)
    return torch.where(summed >= 2**31, summed - 2**32, summed).int()


def gptq(shift: int) -> Pack:
    """`shift` is what the layout takes from a zero point: 1 of gptq, 0 of gptq_v2."""

    def pack(weight: Whole) -> Parts:
        stored = (weight.zeros - shift) % 2**weight.bits
        return {
            "qweight": words(weight.codes, weight.bits).T,
            "qzeros": words(stored.T, weight.bits),
            "scales": weight.scales.T,
            "g_idx": weight.places.int(),
            "bias": torch.zeros(len(weight.codes), dtype=torch.float16),  # as its writers do where there is none
        }

    return pack


def awq(weight: Whole) -> Parts:
    """AutoAWQ's GEMM layout."""

    def in_turns(numbers: Tensor) -> Tensor:
        return numbers.unflatten(1, (-1, 8))[:, :, list(AWQ_ORDER)].flatten(1)  # type: ignore[no-any-return, no-untyped-call]

    return {
        "qweight": words(in_turns(weight.codes.T), 4),
        "qzeros": words(in_turns(weight.zeros.T), 4),
        "scales": weight.scales.T,
    }


def pack_quantized(weight: Whole) -> Parts:
    """compressed-tensors' layout of 4 bits."""
    parts = {
        "weight_packed": words(weight.codes, weight.bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.codes.shape),
    }
    if bool((weight.zeros != 2 ** (weight.bits - 1)).any()):
        parts["weight_zero_point"] = words(weight.zeros.T, weight.bits).T
    return parts


def int_quantized(weight: Whole) -> Parts:
    """compressed-tensors' layout of 8 bits."""
    return {"weight": (weight.codes - 128).to(torch.int8), "weight_scale": weight.scales}


def write_packed(folder: Path, settings: dict[str, Any], make: Callable[[Tensor], tuple[Parts, Tensor]]) -> Parts:
    """A Llama of two layers in `folder`, its projections as `make` packs them (parts, values); its float32 weights.

    Embedding and lm_head are whole numbers times a scale, and so are the same in blocks of 8 bits.
    """
    write_folder(folder, hidden_size=128, intermediate_size=192, num_hidden_layers=2, max_position_embeddings=256)
    stored, values = load_file(folder / "model.safetensors"), {}
    for name, tensor in list(stored.items()):
        if name.endswith("_proj.weight"):
            parts, values[name] = make(stored.pop(name))
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{part}": each.contiguous() for part, each in parts.items()}
        elif tensor.ndim == 2:
            codes = torch.randint(-127, 128, tensor.shape)
            codes[:, ::32] = 127
            stored[name] = values[name] = codes.float() / 2**9
        else:
            values[name] = tensor
    save_file(stored, folder / "model.safetensors")
    edit_json(folder / "config.json", quantization_config=settings)
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == settings
    return values
