"""Hold what our reader gave the exporter against the model that transformers has loaded: every number, every tie.

It is exact, and so finds a fault of the reader in a quantized bundle too, whose logits differ anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from starling.engine.errors import StarlingError
from starling.export.check.source_model import SourceModel
from starling.export.checkpoints.checkpoint import Checkpoint, TensorSource

_CHUNK_VALUES = 8 * 1024 * 1024
# Of a configuration: what does not change what the model computes, or is compared by the weights themselves.
_NOT_COMPARED = frozenset({"architectures", "dtype", "tie_word_embeddings", "transformers_version"})
_REPORT = "nothing was written, please report it"


def require_same(checkpoint: Checkpoint, source: SourceModel) -> None:
    """Raise StarlingError where the exporter was given another configuration or other weights than the files hold."""
    for key, (ours, theirs) in _differences(checkpoint.config, source.config).items():
        raise StarlingError(f"the export had {key} = {ours!r}, transformers reads {theirs!r}: {_REPORT}")
    if absent := sorted(set(source.names.values()).intersection(source.missing)):
        raise StarlingError(f"transformers finds no {absent[0]}, the export had one: {_REPORT}")
    if lost := sorted(name for name in source.unexpected if not _has_a_word(name, checkpoint.left_out)):
        raise StarlingError(f"transformers reports tensor {lost[0]} as unexpected, the export said nothing: {_REPORT}")
    whole = source.model.state_dict(keep_vars=True)
    read = set(checkpoint.tensors.names())
    covered = {id(whole[own]) for name, own in source.names.items() if name in read}
    for name, own in source.names.items():
        if name in read:
            _require_equal(name, whole[own], checkpoint.tensors)
        elif isinstance(whole[own], torch.nn.Parameter) and id(whole[own]) not in covered:
            raise StarlingError(f"transformers has a {name} of its own, the export took another tensor's: {_REPORT}")


def _differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> dict[str, tuple[Any, Any]]:
    mine, other = ours.to_dict(), theirs.to_dict()
    keys = [k for k in mine.keys() | other.keys() if k not in _NOT_COMPARED and not k.startswith("_")]
    return {key: (mine.get(key), other.get(key)) for key in sorted(keys) if mine.get(key) != other.get(key)}


def _has_a_word(name: str, left_out: tuple[str, ...]) -> bool:
    # transformers reports the name that it made of the stored one: the end of it is the same.
    end = name.split(".")[-2:]
    return any(each.split(".")[-2:] == end for each in left_out)


def _require_equal(name: str, theirs: torch.Tensor, ours: TensorSource) -> None:
    if tuple(theirs.shape) != ours.shape(name):
        shapes = f"{list(ours.shape(name))}, transformers has {list(theirs.shape)}"
        raise StarlingError(f"{name} was exported as {shapes}: {_REPORT}")
    count = theirs.shape[0] if theirs.ndim else 1
    step = max(1, _CHUNK_VALUES * count // max(1, theirs.numel()))
    for start in range(0, count, step):
        wanted = theirs[start : start + step] if theirs.ndim else theirs
        rows = ours.rows(name, start, start + step).to(theirs.dtype)
        if not torch.equal(rows, wanted):
            worst = (rows - wanted).abs().max()
            raise StarlingError(f"{name} is not what transformers loads (off by up to {worst:.3g}): {_REPORT}")
