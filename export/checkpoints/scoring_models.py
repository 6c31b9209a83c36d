"""Checkpoints that score texts: where their head is, and how they read a text.

Beside transformers' own classes there is one form that it has no class for, that of Starling-RM-7B-alpha: the weights
of a PyTorch module with a trunk, which it calls `transformer`, and an nn.Linear `v_head` without a bias. Its score is
read before the first padding token, which is `<unk>`, and a long text loses its beginning.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from starling.engine.bundle.model_records import Pooling, Side
from starling.engine.errors import UnsupportedModelError, UserError
from starling.engine.names import Task
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.checkpoints.embedding_files import EmbeddingPooling, embedding_of
from starling.export.checkpoints.model_class import SCORING, scores_texts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from starling.export.checkpoints.checkpoint import StoredTensors, TokenizerFiles

VALUE_HEAD = "v_head.weight"
#: Where such a module has its trunk; the first that a checkpoint has is what PyTorch would load last.
TRUNKS = ("transformer.", "model.model.", "model.")
#: Tokens of a text at most, as the model's card has it.
VALUE_HEAD_LENGTH = 2048


class RenamedTensors:
    """StoredTensors under other names: `names` has the stored name of each."""

    def __init__(self, stored: StoredTensors, names: Mapping[str, str]) -> None:
        self._stored, self._names = stored, names
        self.file = getattr(stored, "file", None)
        own = {theirs: name for name, theirs in names.items()}
        self.promised: Mapping[str, Path] = {own.get(name, name): file for name, file in stored.promised.items()}

    def names(self) -> Collection[str]:
        """See TensorSource."""
        return self._names.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return self._stored.shape(self._names[name])

    def is_floating(self, name: str) -> bool:
        """See StoredTensors."""
        return self._stored.is_floating(self._names[name])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See TensorSource."""
        return self._stored.rows(self._names[name], start, stop)


def has_value_head(stored: StoredTensors, config: PreTrainedConfig) -> bool:
    """Whether these are the weights of a trunk with a `v_head` in a module of their own."""
    return VALUE_HEAD in stored.names() and not scores_texts(config)


def as_scoring_model(
    stored: StoredTensors, config: PreTrainedConfig, where: str
) -> tuple[RenamedTensors, PreTrainedConfig, tuple[str, ...]]:
    """A checkpoint with a value head under the names, and with the configuration, of transformers' scoring class.

    The third are the stored tensors that a score does not depend on: lm_head's, and a trunk's that another one's
    replaces. Raises UnsupportedModelError where transformers has no scoring class for such a trunk.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        problem = f"{where} has a {VALUE_HEAD}, but transformers has no *{SCORING} of model_type {config.model_type!r}"
        raise UnsupportedModelError(problem)
    scoring_class = cast(Any, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)])
    found = [trunk for trunk in TRUNKS if any(name.startswith(trunk) for name in stored.names())]
    trunk, prefix = (found or [TRUNKS[-1]])[0], f"{scoring_class.base_model_prefix}."
    names, unused = {}, []
    for name in stored.names():
        if name == VALUE_HEAD:
            names["score.weight"] = name
        elif name.endswith("lm_head.weight"):
            unused.append(name)
        elif name.startswith(trunk):
            names[prefix + name.removeprefix(trunk)] = name
        elif any(name.startswith(other) for other in found[1:]):
            unused.append(name)
        else:
            names[name] = name  # nothing that has a place: it is refused as in every checkpoint
    scoring = copy.deepcopy(config)
    scoring.architectures = [scoring_class.__name__]
    scoring.num_labels = stored.shape(VALUE_HEAD)[0]
    return RenamedTensors(stored, names), scoring, tuple(sorted(unused))


def pooling_of(config: PreTrainedConfig, tokenizer: TokenizerFiles, *, value_head: bool) -> Pooling:
    """How a model of transformers' scoring class for `config` reads a text, or one with a value head."""
    named = [str(label) for _, label in sorted((config.id2label or {}).items())]
    labels = tuple(named if len(set(named)) == len(named) else (f"LABEL_{index}" for index in range(len(named))))
    if value_head:
        unknown = _id_of("unk_token", tokenizer)
        length = min(VALUE_HEAD_LENGTH, config.max_position_embeddings)
        return Pooling(labels, "before_first_pad", unknown, "left", length)
    side = tokenizer.tokenizer_config.get("truncation_side")
    return Pooling(
        labels,
        "last" if config.pad_token_id is None else "last_but_pad",
        config.pad_token_id,
        cast(Side, side if side in ("left", "right") else "right"),
        problem_type=config.problem_type,
    )


def for_task(checkpoint: Checkpoint, task: Task | None, pooling: EmbeddingPooling | None = None) -> Checkpoint:
    """The checkpoint for a bundle of another task than its own (None): a language model embeds texts as well.

    `pooling` makes one vector of a text's hidden states; None: as sentence-transformers' files in the checkpoint say,
    else by the last token. Raises UserError where its model is not for `task`, UnsupportedModelError where those files
    ask for what is not exported.
    """
    if task is None or task == checkpoint.task:
        return checkpoint
    if task == "embed" and checkpoint.task == "generate":
        read_at, normalize = embedding_of(checkpoint.path, pooling)
        base = pooling_of(checkpoint.config, checkpoint.tokenizer, value_head=False)
        how = replace(base, labels=(), read_at=read_at, pad=None, problem_type=None, normalize=normalize)
        what = "the mean of all tokens' hidden states" if read_at == "mean" else "the last token's hidden state"
        notes = (*checkpoint.notes, f"embeds texts by {what}; lm_head is left out")
        return replace(checkpoint, task=task, pooling=how, notes=notes)
    kinds = {"generate": "generates text", "score": "scores texts", "embed": "embeds texts"}
    raise UserError(f"{checkpoint.name} {kinds[checkpoint.task]}: a bundle that {kinds[task]} cannot be made of it")


def _id_of(role: str, files: TokenizerFiles) -> int | None:
    """The id of the special token of that role; None where there is none."""
    import tokenizers

    named = files.tokenizer_config.get(role) or files.special_tokens_map.get(role)
    text = named.get("content") if isinstance(named, dict) else named
    found = None
    if isinstance(text, str):
        found = tokenizers.Tokenizer.from_str(files.tokenizer_json).token_to_id(text)
    return found
