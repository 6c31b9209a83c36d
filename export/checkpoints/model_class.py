"""Which classes of transformers a configuration stands for: what is loaded, and the language model in it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from starling.engine.errors import UnsupportedModelError, one_line

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelClasses:
    """`loaded` of `config` is what a checkpoint is for; `language_model` of `text_config` is what is exported of it.

    The two are one but for models that also see or hear.
    """

    loaded: type[PreTrainedModel]
    config: PreTrainedConfig
    language_model: type[PreTrainedModel]
    text_config: PreTrainedConfig

    @property
    def is_part(self) -> bool:
        """Whether the language model is only a part of what is loaded."""
        return self.text_config is not self.config


#: How transformers' classes end that score texts.
SCORING = "ForSequenceClassification"


def scores_texts(config: PreTrainedConfig) -> bool:
    """Whether the checkpoint's class scores a text, and gives no next token."""
    return any(str(name).endswith(SCORING) for name in config.architectures or ())


def auto_class(config: PreTrainedConfig) -> Any:
    """The class of transformers that builds and loads a checkpoint of `config`, by its `from_…` methods.

    Raises UnsupportedModelError where it has none for such a model.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"model_type {config.model_type!r} has no *ForCausalLM class: only decoders export")
    if not scores_texts(config):
        return AutoModelForCausalLM
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UnsupportedModelError(f"model_type {config.model_type!r} has no *{SCORING} class in this transformers")
    return AutoModelForSequenceClassification


def head_of(model: PreTrainedModel) -> Any:
    """What makes logits or scores of the last hidden states: an nn.Linear.

    Raises UnsupportedModelError where a model that scores has another kind of head.
    """
    from torch import nn

    if not scores_texts(model.config):
        return model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(f"{type(model).__name__}: its head is no `score`, one product with hidden states")
    return head


def model_classes(config: PreTrainedConfig) -> ModelClasses:
    """The classes for `config`. Raises UnsupportedModelError where transformers has no language model for it."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    text_config = _text_config(config)
    mapping = auto_class(text_config)._model_mapping
    language_model = cast("type[PreTrainedModel]", mapping[type(text_config)])
    if text_config is config:
        return ModelClasses(language_model, config, language_model, config)
    mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    for several in (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,) if scores_texts(config) else mappings:
        if type(config) in several and (whole := cast(Any, several[type(config)])) is not language_model:
            return ModelClasses(whole, config, language_model, text_config)
    raise UnsupportedModelError(
        f"model_type {config.model_type!r} has a {text_config.model_type!r} model in it that cannot be taken out: "
        "export a checkpoint of that model alone"
    )


def _text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's own part of the configuration; where it scores texts, with the labels of the whole."""
    text: PreTrainedConfig = config.get_text_config(decoder=True)
    if text is not config and scores_texts(config):
        text = copy.deepcopy(text)
        text.architectures, text.id2label, text.label2id = config.architectures, config.id2label, config.label2id
        text.problem_type = config.problem_type
    return text


def without_weights(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model in float32 on PyTorch's meta device. Raises UnsupportedModelError where transformers cannot build it."""
    import torch

    try:
        with torch.device("meta"):
            build: Callable[..., PreTrainedModel] = model_class._from_config
            return build(config, dtype=torch.float32, attn_implementation="eager")
    except Exception as error:  # a class computes with the settings before it looks at them
        problem = f"transformers cannot build a {config.model_type!r} model: {one_line(error)}"
        raise UnsupportedModelError(problem) from error


def names_in_whole(whole: PreTrainedModel, part: PreTrainedModel) -> dict[str, str]:
    """For every tensor of the language model `part` its name in `whole`, the model that it is a part of.

    Raises UnsupportedModelError where `whole` has no such part, or several.
    """
    names = list(part.state_dict())
    if type(whole) is type(part):
        return {name: name for name in names}
    for kind, prefix in ((type(part), ""), (type(part.base_model), f"{part.base_model_prefix}.")):
        places = [name for name, module in whole.named_modules() if type(module) is kind]
        if len(places) == 1:
            # The head of a base model stands beside the model that has it.
            return {n: f"{places[0]}.{n.removeprefix(prefix)}" if n.startswith(prefix) else n for n in names}
    raise UnsupportedModelError(f"{type(whole).__name__}: the {type(part).__name__} in it cannot be taken out")


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep transformers from printing bars and reports; what it finds comes as values and exceptions."""
    import logging

    from transformers.utils import logging as their_logging

    level, bars = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity(logging.CRITICAL)
    their_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        their_logging.set_verbosity(level)
        if bars:
            their_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def from_pretrained(model_class: Any, source: Path | None, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model in float32 by transformers' `from_pretrained`, and its report: missing_keys, unexpected_keys, …"""
    import torch

    with _quietly():
        model, report = model_class.from_pretrained(
            source,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    return model, report
