"""Quantized weights of Hugging Face checkpoints as their methods lay them out, read by the rows of torch.nn.Linear.

GPTQ and AWQ store [inputs, outputs], compressed-tensors and fp8 [outputs, inputs]. Eight numbers of 4 bits, or four of
8, lie in an int32, the first in its lowest bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from starling.engine.errors import CheckpointError
from starling.export.checkpoints.packed.packed_module import PackedModule
from starling.export.checkpoints.packed.packed_weight import (
    Fp8Weight,
    IntegerWeight,
    PackedWeight,
    Read,
    across,
    unpacked,
)
from starling.export.checkpoints.packed.packing_settings import PackingSettings
from starling.export.checkpoints.stored_tensors import SafetensorsFiles

FLOATS = ("F32", "F16", "BF16")
FP8 = "F8_E4M3"
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of output i of eight in their int32


def packed_weights(files: SafetensorsFiles, settings: PackingSettings) -> dict[str, PackedWeight]:
    """The quantized weights of a folder by the names of the modules that they are `weight` of.

    Raises CheckpointError where a tensor is missing or does not fit the others, UnsupportedModelError for a width that
    cannot be read.
    """
    make = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed, "fp8": _fp8}[settings.method]
    ends = ("qweight",) if settings.method in ("gptq", "awq") else ("weight_packed", "weight")
    found: dict[str, PackedWeight] = {}
    for name in files.names():
        module, _, end = name.rpartition(".")
        quantized = end != "weight" or files.dtype(name) in ("I8", FP8)
        if module and end in ends and quantized:
            if end != "weight" and f"{module}.weight" in files.names():
                raise CheckpointError(
                    f"{files.file} has both {name}, which is quantized, and {module}.weight, which is not: one of them "
                    "is another model's"
                )
            found[module] = make(PackedModule(files, module), settings)
    return found


def _gptq(module: PackedModule, settings: PackingSettings) -> IntegerWeight:
    qweight, words, outputs = module.matrix("qweight", ("I32",))
    qzeros, groups, zero_words = module.matrix("qzeros", ("I32",))
    bits = settings.bits[0] if len(settings.bits) == 1 else 32 * zero_words // outputs
    module.require_bits(bits, settings.bits)
    inputs = words * 32 // bits
    module.shaped("qzeros", ("I32",), (groups, -(-outputs * bits // 32)))
    scales = module.shaped("scales", FLOATS, (groups, outputs))
    group = module.group(inputs, groups, settings.group_sizes)
    places = module.places("g_idx", inputs, groups, group, wanted=settings.has_order)
    words_of, scales_of, zero_words_of = (module.columns(name) for name in (qweight, scales, qzeros))

    def zeros(start: int, stop: int) -> Tensor:
        shifted = across(zero_words_of, bits, start, stop).add_(settings.zero_shift)
        return shifted.bitwise_and_(2**bits - 1)  # a zero of 0 was stored as the greatest number

    return IntegerWeight(
        f"gptq int{bits}" + ("" if places is None else " in an order of its own"),
        (outputs, inputs),
        (qweight, qzeros, scales, f"{module.name}.g_idx"),
        bits,
        group,
        lambda start, stop: unpacked(words_of(start, stop), bits),
        lambda start, stop: scales_of(start, stop).float(),
        zeros,
        places,
    )


def _awq(module: PackedModule, settings: PackingSettings) -> IntegerWeight:
    qweight, inputs, words = module.matrix("qweight", ("I32",))
    bits, outputs = 4, words * 8
    qzeros, groups, _ = module.matrix("qzeros", ("I32",))
    module.shaped("qzeros", ("I32",), (groups, words))
    scales = module.shaped("scales", FLOATS, (groups, outputs))
    group = module.group(inputs, groups, settings.group_sizes)
    codes_of, scales_of, zeros_of = (module.columns(name) for name in (qweight, scales, qzeros))
    return IntegerWeight(
        "awq int4",
        (outputs, inputs),
        (qweight, qzeros, scales),
        bits,
        group,
        lambda start, stop: across(codes_of, bits, start, stop, _AWQ_PLACES),
        lambda start, stop: scales_of(start, stop).float(),
        lambda start, stop: across(zeros_of, bits, start, stop, _AWQ_PLACES),
    )


def _compressed(module: PackedModule, settings: PackingSettings) -> PackedWeight:
    if not module.has("weight_packed"):
        weight = module.part("weight", ("I8", FP8))
        return _fp8(module, settings) if module.files.dtype(weight) == FP8 else _int8(module, settings)
    packed, outputs, words = module.matrix("weight_packed", ("I32",))
    height, inputs = (
        int(size) for size in module.files.rows(module.shaped("weight_shape", ("I64", "I32"), (2,)), 0, 2)
    )
    if inputs < 1 or height != outputs:
        raise CheckpointError(
            f"{module.files.file}: {module.name}.weight_shape is [{height}, {inputs}], its weight_packed has "
            f"{outputs} rows: no fit"
        )
    bits = next((each for each in settings.bits if -(-inputs * each // 32) == words), words * 32 // inputs)
    module.require_bits(bits, settings.bits)
    module.shaped("weight_packed", ("I32",), (outputs, -(-inputs * bits // 32)))
    scales, groups = _scales(module, outputs)
    group = module.group(inputs, groups, settings.group_sizes)
    words_of, middle = module.rows(packed), 2 ** (bits - 1)
    zeros = _middle(groups, middle)
    parts = [packed, *(f"{module.name}.weight_{end}" for end in ("shape", "scale", "g_idx"))]
    if settings.has_zeros or module.has("weight_zero_point"):
        name = module.shaped("weight_zero_point", ("I32",), (-(-outputs * bits // 32), groups))
        zero_words = module.rows(name)
        parts.append(name)

        def zeros(start: int, stop: int) -> Tensor:
            return across(zero_words, bits, start, stop)

    places = module.places("weight_g_idx", inputs, groups, group, wanted=settings.has_order)
    return IntegerWeight(
        f"compressed-tensors int{bits}" + ("" if places is None else " in an order of its own"),
        (outputs, inputs),
        tuple(parts),
        bits,
        group,
        lambda start, stop: unpacked(words_of(start, stop), bits)[:, :inputs],
        scales,
        zeros,
        places,
    )


def _int8(module: PackedModule, settings: PackingSettings) -> IntegerWeight:
    weight, outputs, inputs = module.matrix("weight", ("I8",))
    scales, groups = _scales(module, outputs)
    group = module.group(inputs, groups, settings.group_sizes)
    numbers, zeros, parts = module.rows(weight), _middle(groups, 128), [weight, f"{module.name}.weight_scale"]
    if settings.has_zeros or module.has("weight_zero_point"):
        name = module.part("weight_zero_point", ("I8",))
        points = module.by_row(name, outputs)[0]
        parts.append(name)

        def zeros(start: int, stop: int) -> Tensor:
            return points(start, stop).to(torch.int16) + 128

    return IntegerWeight(
        "compressed-tensors int8",
        (outputs, inputs),
        tuple(parts),
        8,
        group,
        lambda start, stop: numbers(start, stop).to(torch.int16) + 128,
        scales,
        zeros,
    )


def _fp8(module: PackedModule, settings: PackingSettings) -> Fp8Weight:
    weight, outputs, inputs = module.matrix("weight", (FP8,))
    part = "weight_scale_inv" if module.has("weight_scale_inv") else "weight_scale"
    name = module.part(part, FLOATS)
    shape = module.files.shape(name)
    height, width = settings.block or (outputs, inputs)
    blocks = {
        (-(-outputs // height), -(-inputs // width)): (height, width),
        (outputs, 1): (1, inputs),
        (outputs,): (1, inputs),
        (1, 1): (outputs, inputs),
        (1,): (outputs, inputs),
        (): (outputs, inputs),
    }
    if shape not in blocks:
        raise CheckpointError(
            f"{module.files.file}: tensor {name} is {list(shape)}, which are scales neither for {module.name} "
            f"[{outputs}, {inputs}], nor its rows, nor blocks of {height} by {width}: no fit"
        )
    block = blocks[shape]
    scales = (
        module.files.rows(name, 0, max(1, *shape, 1)).float().reshape(-(-outputs // block[0]), -(-inputs // block[1]))
    )
    return Fp8Weight("fp8", (outputs, inputs), (weight, name), block, module.rows(weight), scales)


def _scales(module: PackedModule, outputs: int) -> tuple[Read, int]:
    read, groups = module.by_row(module.part("weight_scale", FLOATS), outputs)
    return lambda start, stop: read(start, stop).float(), groups


def _middle(groups: int, zero: int) -> Read:
    return lambda start, stop: torch.full((stop - start, groups), zero, dtype=torch.int16)
