"""Where the stored tensors of a checkpoint go in the model: asked of transformers, which loads them without values.

Every name that it maps, prefix that it adds, expert that it stacks and embedding that it ties is its own doing, in the
version that is installed.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from starling.engine.errors import CheckpointError, UnsupportedModelError, one_line
from starling.export.checkpoints.checkpoint import StoredTensors
from starling.export.checkpoints.model_class import (
    ModelClasses,
    from_pretrained,
    head_of,
    model_classes,
    names_in_whole,
    scores_texts,
    without_weights,
)
from starling.export.checkpoints.recorded_tensor import RecordedTensor, height, make_rows, sources
from starling.export.checkpoints.unplaced import judge

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_CHUNK_VALUES = 8 * 1024 * 1024


class PlacedTensors:
    """A TensorSource under the model's names, made of one under the checkpoint's."""

    def __init__(self, stored: StoredTensors, tensors: dict[str, RecordedTensor]) -> None:
        self._stored, self._tensors = stored, tensors

    def names(self) -> Collection[str]:
        """See TensorSource."""
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return tuple(self._tensors[name].shape)

    def sources(self, name: str) -> Collection[str]:
        """The stored tensors that a tensor is made of."""
        return set(sources(self._tensors[name]))

    def stored_name(self, name: str) -> str | None:
        """The stored tensor that a tensor is, row for row; None where it is made of one or several."""
        made = self._tensors[name].made
        return made if isinstance(made, str) else None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See TensorSource."""
        tensor = self._tensors[name]
        return make_rows(tensor, start, min(stop, height(tensor)), self._stored.rows)


@dataclass(frozen=True, slots=True)
class Placement:
    """The language model's `config` and tensors; `left_out` of the stored ones have no place, as `notes` say."""

    config: PreTrainedConfig
    tensors: PlacedTensors
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def place(stored: StoredTensors, config: PreTrainedConfig, where: str) -> Placement:
    """Give every tensor of `stored` its place in the model of `config`; `where` names the file or folder.

    The result's configuration is the language model's own: of a model that also sees or hears, its part for text. Its
    `tie_word_embeddings` is what the tensors say.

    Raises:
        UnsupportedModelError: transformers has no such model, or a tensor has no place in it.
        CheckpointError: a tensor is missing, or has another shape than the configuration says.
    """
    classes = model_classes(config)
    empty = without_weights(
        classes.loaded, classes.config
    )  # first for its refusals: from_pretrained words them otherwise
    model, report = _load(classes, stored, where)
    placed = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, RecordedTensor)}
    _refuse_misfits(model, report["mismatched_keys"], where)
    used = _sources_of(placed)
    left_out = sorted(set(stored.names()) - used)
    notes = judge(left_out, stored, model, where)

    part = without_weights(classes.language_model, classes.text_config) if classes.is_part else empty
    names = names_in_whole(model, part)
    head_of(part)  # for its refusal
    _refuse_missing(part, {name for name, own in names.items() if own not in placed}, stored, where)
    tensors = {name: placed[own] for name, own in names.items() if own in placed}
    _refuse_integers(part, tensors, stored, where)
    if others := sorted(used - _sources_of(tensors)):
        notes.append(f"left out: {len(others)} tensors beside the language model's, such as {others[0]}")
    said = bool(getattr(model.config, "tie_word_embeddings", False))
    text_config = copy.deepcopy(classes.text_config)
    if not scores_texts(text_config):  # a head for scores is tied to nothing
        tied = _tied_head(part, tensors, stored, said)
        if tied is not None:
            del tensors[tied]
        elif said:
            notes.append(
                "config.json ties lm_head to the embedding, the checkpoint has an lm_head of its own: it is taken"
            )
        text_config.tie_word_embeddings = tied is not None
    text_config.architectures = [classes.language_model.__name__]
    return Placement(text_config, PlacedTensors(stored, _distinct(tensors)), tuple(left_out), tuple(notes))


def _load(
    classes: ModelClasses, stored: StoredTensors, where: str
) -> tuple[PreTrainedModel, dict[str, Collection[Any]]]:
    """The model with recorded tensors for weights, and transformers' report."""
    try:
        return from_pretrained(
            classes.loaded,
            None,
            config=classes.config,
            state_dict={name: RecordedTensor.stored(name, stored.shape(name)) for name in stored.names()},
            device_map="meta",
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # what its operations raise where shapes do not fit
        raise CheckpointError(f"{where}: transformers cannot place its tensors: {one_line(error)}") from error


def _sources_of(tensors: dict[str, RecordedTensor]) -> set[str]:
    return {source for tensor in tensors.values() for source in sources(tensor)}


def _refuse_misfits(model: PreTrainedModel, mismatched: Collection[Any], where: str) -> None:
    misfits = {name: (list(found), list(wanted)) for name, found, wanted in mismatched}
    for name in model.state_dict():
        if name in misfits:
            found, wanted = misfits[name]
            raise CheckpointError(f"{where}: tensor {name} is {found}, config.json wants {wanted}: no fit")


def _refuse_missing(part: PreTrainedModel, missing: set[str], stored: StoredTensors, where: str) -> None:
    for name in part.state_dict():
        if name in missing:
            for lost, file in stored.promised.items():
                raise CheckpointError(f"{file} has no tensor {lost}, which {where} puts there: get it again")
            raise CheckpointError(
                f"{where} has no tensor {name}, which {type(part).__name__} needs: the checkpoint is not whole, or is "
                "of another model than config.json says"
            )


def _refuse_integers(
    part: PreTrainedModel, tensors: dict[str, RecordedTensor], stored: StoredTensors, where: str
) -> None:
    wanted = part.state_dict()
    for name, tensor in tensors.items():
        for source in sources(tensor) if wanted[name].is_floating_point() else ():
            if not stored.is_floating(source):
                raise UnsupportedModelError(
                    f"{where}: tensor {source} holds integers, but config.json has no quantization_config that says "
                    "how to read them: export the unquantized checkpoint"
                )


def _tied_head(
    part: PreTrainedModel, tensors: dict[str, RecordedTensor], stored: StoredTensors, said: bool
) -> str | None:
    """The name of the lm_head that is the embedding's tensor, or (where config.json has `said` so) its equal."""
    modules = {id(module): name for name, module in part.named_modules()}
    ends = (part.get_input_embeddings(), part.get_output_embeddings())  # type: ignore[no-untyped-call]
    embedding, head = (f"{modules.get(id(end))}.weight" for end in ends)
    if embedding not in tensors or head not in tensors:
        return None
    one = tensors[embedding] is tensors[head]
    return head if one or (said and _are_equal(tensors[embedding], tensors[head], stored)) else None


def _are_equal(one: RecordedTensor, other: RecordedTensor, stored: StoredTensors) -> bool:
    if one.shape != other.shape:
        return False
    step = max(1, _CHUNK_VALUES * height(one) // max(1, one.numel()))
    return all(
        torch.equal(*(make_rows(each, start, start + step, stored.rows) for each in (one, other)))
        for start in range(0, height(one), step)
    )


def _distinct(tensors: dict[str, RecordedTensor]) -> dict[str, RecordedTensor]:
    """The tensors without those that another name has already."""
    first = {id(tensor): name for name, tensor in reversed(tensors.items())}
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}
