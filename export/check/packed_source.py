"""The weights of a folder with quantized ones, dequantized by the definitions of their methods, for the comparison.

Numbers are taken from the bits of whole tensors, in another way than the exporter's reader takes them from words.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

Parts = Mapping[str, Tensor]
_CHUNK_BYTES = 2**20  # a bit of it takes a byte, then a float
_PACKED = {"gptq": "qweight", "awq": "qweight", "compressed-tensors": "weight_packed"}
_USED = {
    "gptq": {"qweight", "qzeros", "scales", "g_idx"},
    "awq": {"qweight", "qzeros", "scales"},
    "compressed-tensors": {f"weight_{end}" for end in ("packed", "shape", "scale", "zero_point", "g_idx")} | {"weight"},
    "fp8": {"weight", "weight_scale", "weight_scale_inv"},
}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the outputs of eight in an int32, from its lowest bits


def dequantized_weights(folder: Path, settings: Mapping[str, Any], wanted: Callable[[str], bool]) -> Parts:
    """The tensors of a folder that are `wanted`, with a float32 MODULE.weight for what is packed of it."""
    method = str(settings["quant_method"])
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _stored(_files(folder)):
        if wanted(name):
            module, _, part = name.rpartition(".")
            modules.setdefault(module, {})[part] = tensor
    found: dict[str, Tensor] = {}
    for module, parts in modules.items():
        weight = _weight(parts, method, settings)
        used = _USED[method] if weight is not None else set()
        found |= {f"{module}.{part}": tensor for part, tensor in parts.items() if part not in used}
        if weight is not None:
            found[f"{module}.weight"] = weight
        parts.clear()
    return found


def _files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def _stored(files: list[Path]) -> Iterator[tuple[str, Tensor]]:
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
                yield name, file.get_tensor(name)


def _weight(parts: Parts, method: str, settings: Mapping[str, Any]) -> Tensor | None:
    """The weight of a module; None where it is not quantized."""
    if _PACKED.get(method) in parts:
        return {"gptq": _gptq, "awq": _awq, "compressed-tensors": _packed}[method](parts, settings)
    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    if scale is None or "weight" not in parts:
        return None
    weight = parts["weight"].float()
    if "weight_zero_point" in parts:
        weight = weight - _spread(parts["weight_zero_point"].float(), weight.shape, settings)
    return weight * _spread(scale.float(), weight.shape, settings)


def _gptq(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    inputs, outputs = parts["g_idx"].numel() if "g_idx" in parts else None, parts["qweight"].shape[1]
    bits = int(settings["bits"]) if inputs is None else 32 * parts["qweight"].shape[0] // inputs
    codes = _numbers(parts["qweight"].T, bits)
    zeros = _numbers(parts["qzeros"], bits)[:, :outputs].T
    if settings.get("checkpoint_format", "gptq") == "gptq":
        zeros = (zeros + 1) % 2**bits
    size = int(settings["group_size"])
    places = parts["g_idx"].long() if inputs else torch.arange(codes.shape[1]) // (codes.shape[1] if size < 0 else size)
    return (codes - zeros[:, places]) * parts["scales"].float().T[:, places]


def _awq(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    codes, zeros = (_in_order(_numbers(parts[name], 4)) for name in ("qweight", "qzeros"))
    repeats = len(codes) // len(zeros)
    scales = parts["scales"].float()
    return ((codes - zeros.repeat_interleave(repeats, 0)) * scales.repeat_interleave(repeats, 0)).T


def _in_order(numbers: Tensor) -> Tensor:
    eights = numbers.unflatten(1, (-1, 8))  # type: ignore[no-untyped-call]
    ordered = torch.empty_like(eights)
    ordered[:, :, list(_AWQ_ORDER)] = eights
    return ordered.flatten(1)


def _packed(parts: Parts, settings: Mapping[str, Any]) -> Tensor:
    outputs, inputs = parts["weight_shape"].tolist()
    bits = 32 * parts["weight_packed"].shape[1] // inputs
    codes = _numbers(parts["weight_packed"], bits)[:, :inputs]
    zeros = torch.full((1, 1), float(2 ** (bits - 1)))
    if "weight_zero_point" in parts:
        zeros = _numbers(parts["weight_zero_point"].T, bits)[:, :outputs].T
    scales = parts["weight_scale"].float()
    if "weight_g_idx" in parts:
        places = parts["weight_g_idx"].long()
        return (codes - (zeros if zeros.numel() == 1 else zeros[:, places])) * scales[:, places]
    return (codes - _spread(zeros, codes.shape, {})) * _spread(scales, codes.shape, {})


def _spread(values: Tensor, shape: torch.Size, settings: Mapping[str, Any]) -> Tensor:
    """Scales or zero points for each weight of a matrix."""
    grid = values.reshape(-1, 1) if values.ndim < 2 else values
    block = settings.get("weight_block_size") or next(
        (group["weights"].get("block_structure") for group in settings.get("config_groups", {}).values()), None
    )
    sizes = [-(-whole // count) for whole, count in zip(shape, grid.shape, strict=True)]
    if block is not None and grid.numel() > 1:
        sizes = list(block)
    return grid.repeat_interleave(sizes[0], 0)[: shape[0]].repeat_interleave(sizes[1], 1)[:, : shape[1]]


def _numbers(words: Tensor, bits: int) -> Tensor:
    """The numbers float32 [n, m * 32 / bits] whose bits lie in int32 words [n, m], lowest first."""
    stored: NDArray[np.uint8] = words.contiguous().numpy().astype("<i4").view(np.uint8)
    numbers = np.empty((len(stored), stored.shape[1] * 8 // bits), dtype=np.float32)
    step = max(1, _CHUNK_BYTES // max(1, stored.shape[1]))
    for start in range(0, len(stored), step):
        by_bit = np.unpackbits(stored[start : start + step], axis=1, bitorder="little")
        numbers[start : start + step] = by_bit.reshape(len(by_bit), -1, bits) @ (
            2.0 ** np.arange(bits, dtype=np.float32)
        )
    return torch.from_numpy(numbers)
