"""config.json's `quantization_config`: which methods of quantizing a checkpoint can be read, and with what settings.

Nothing here loads PyTorch. What cannot be read is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starling.engine.errors import CheckpointError, UnsupportedModelError

WHOLE_BITS = (4, 8)
_ADVICE = "export the unquantized checkpoint"
_COMPRESSED = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized")


@dataclass(frozen=True, slots=True)
class PackingSettings:
    """How a folder's weights are quantized: `method` is its quant_method.

    `bits` may be used, and `group_sizes`, of inputs that share a scale (-1: all; none given: as the tensors' shapes
    say). `zero_shift` is added to the zero points on file; `has_zeros`: every weight has some; `has_order`: each says
    which of its groups an input is in. `block` (rows, columns) shares a scale of fp8. `notes` say what is left aside.
    """

    method: str
    bits: tuple[int, ...] = WHOLE_BITS
    group_sizes: tuple[int, ...] = ()
    zero_shift: int = 0
    has_zeros: bool = False
    has_order: bool = False
    block: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()


def read_packing(values: Mapping[str, Any], where: str) -> PackingSettings | None:
    """The settings in a config.json's `values`, None where nothing is quantized; `where` is the folder.

    Raises UnsupportedModelError for a method, a width or a layout that cannot be read, CheckpointError for a setting
    that is none.
    """
    text = values.get("text_config")
    settings = values.get("quantization_config") or (isinstance(text, Mapping) and text.get("quantization_config"))
    if not settings:
        return None
    if not isinstance(settings, Mapping):
        raise CheckpointError(f"{where}: quantization_config is {settings!r:.80}, which is no object: get it again")
    method = settings.get("quant_method")
    read = _METHODS.get(method) if isinstance(method, str) else None
    if read is None:
        known = ", ".join(_METHODS)
        raise UnsupportedModelError(f"{where} is quantized by {method!r:.80}; {known} can be read: {_ADVICE}")
    return read(settings, where)


def _gptq(settings: Mapping[str, Any], where: str) -> PackingSettings:
    named = settings.get("checkpoint_format", settings.get("format"))
    layout = "gptq" if named is None else named
    _require_one(layout, ("gptq", "gptq_v2"), "checkpoint_format", where)
    _require_one(settings.get("pack_dtype", "int32"), ("int32",), "pack_dtype", where)
    if settings.get("is_marlin_format"):
        raise UnsupportedModelError(f"{where}: weights in the order of Marlin's kernel cannot be read: {_ADVICE}")
    shift = 1 if layout == "gptq" else 0  # its writers subtract 1, its kernels add it again
    has_order = settings.get("desc_act") is True
    if settings.get("dynamic"):  # other settings for some modules
        return PackingSettings("gptq", zero_shift=shift, has_order=has_order)
    bits, size = _bits(settings, where), _group_size(settings, where)
    return PackingSettings("gptq", (bits,), (size,), shift, has_order=has_order)


def _awq(settings: Mapping[str, Any], where: str) -> PackingSettings:
    layout = settings.get("version", settings.get("format")) or "gemm"
    _require_one(str(layout).lower(), ("gemm",), "version", where)
    bits = _bits(settings, where)
    _require_one(bits, (4,), "bits", where)
    return PackingSettings("awq", (bits,), (_group_size(settings, where),))


def _compressed(settings: Mapping[str, Any], where: str) -> PackingSettings:
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(each, Mapping) for each in groups.values()):
        raise CheckpointError(
            f"{where}: config_groups of its quantization_config is no object of objects: get it again"
        )
    _require_one(settings.get("format"), (*_COMPRESSED, "mixed-precision"), "format", where)
    for name in ("sparsity_config", "transform_config"):
        inner = settings.get(name)
        if isinstance(inner, Mapping) and (inner.get("config_groups") or inner.get("format", "dense") != "dense"):
            raise UnsupportedModelError(f"{where}: a checkpoint with a {name} cannot be read: {_ADVICE}")
    schemes = [_weights_of(group, where) for group in groups.values()]
    active = any(group.get(f"{side}_activations") for group in groups.values() for side in ("input", "output"))
    return PackingSettings(
        "compressed-tensors",
        tuple(sorted({_bits(each, where, "num_bits") for each in schemes})),
        tuple(_group_size(each, where) if each.get("strategy") == "group" else -1 for each in schemes),
        has_zeros=all(each.get("symmetric") is False for each in schemes),
        has_order=all(each.get("actorder") in (True, "group", "dynamic") for each in schemes),
        block=next((_block(each["block_structure"], where) for each in schemes if each.get("block_structure")), None),
        notes=_activation_notes(active) + _cache_notes(settings.get("kv_cache_scheme")),
    )


def _weights_of(group: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The scheme for the weights of one of `config_groups`."""
    if group.get("format") is not None:
        _require_one(group["format"], _COMPRESSED, "format", where)
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        raise UnsupportedModelError(f"{where}: config_groups without quantized weights cannot be read: {_ADVICE}")
    if weights.get("type", "int") == "float":
        _require_one(weights.get("num_bits"), (8,), "num_bits of type float", where)
    _require_one(weights.get("strategy"), ("tensor", "channel", "group", "block"), "strategy", where)
    return weights


def _fp8(settings: Mapping[str, Any], where: str) -> PackingSettings:
    _require_one(settings.get("fmt", "e4m3"), ("e4m3", "float8_e4m3fn"), "fmt", where)
    active = settings.get("activation_scheme") is not None
    block = _block(settings.get("weight_block_size"), where)
    return PackingSettings("fp8", (8,), block=block, notes=_activation_notes(active))


_METHODS: dict[str, Callable[[Mapping[str, Any], str], PackingSettings]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
    "fp8": _fp8,
}


def _activation_notes(active: bool) -> tuple[str, ...]:
    return ("its quantization of activations, with scales for them, was left aside: weights alone",) if active else ()


def _cache_notes(scheme: object) -> tuple[str, ...]:
    return ("its quantization of the KV cache was left aside",) if scheme else ()


def _require_one(value: object, known: tuple[object, ...], name: str, where: str) -> None:
    if not any(value == each and type(value) is type(each) for each in known):  # 4.0 is no number of bits
        listed = ", ".join(str(each) for each in known)
        raise UnsupportedModelError(f"{where} is quantized with {name} {value!r:.80}; read is {listed}: {_ADVICE}")


def _bits(settings: Mapping[str, Any], where: str, name: str = "bits") -> int:
    bits = settings.get(name)
    _require_one(bits, WHOLE_BITS, name, where)
    assert isinstance(bits, int)
    return bits


def _group_size(settings: Mapping[str, Any], where: str) -> int:
    size = settings.get("group_size", settings.get("q_group_size"))
    if type(size) is not int or size == 0 or size < -1:
        raise CheckpointError(
            f"{where}: group_size of its quantization_config is {size!r:.80}, no number of inputs: get it again"
        )
    return size


def _block(block: object, where: str) -> tuple[int, int] | None:
    if block is None:
        return None
    if isinstance(block, list) and len(block) == 2 and all(type(each) is int and each > 0 for each in block):
        return block[0], block[1]
    raise CheckpointError(f"{where}: a block of its quantization_config is {block!r:.80}, no two sizes: get it again")
