"""What the exporter reads: a configuration, tensors row range by row range, and the files of the tokenizer.

`model_source.open_checkpoint` takes every form of MODEL. Nothing here holds a whole model in memory. PyTorch is loaded
when a checkpoint is opened, not when this module is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from starling.engine.bundle.model_records import Pooling
from starling.engine.errors import CheckpointError, UnsupportedModelError, one_line
from starling.engine.names import Task
from starling.engine.untrusted_files import FileReader
from starling.export.checkpoints.model_class import auto_class
from starling.export.checkpoints.stored_grid import PackedSource

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


#: Reads of a checkpoint's files.
FILES = FileReader(CheckpointError, "get the file again")


class TensorSource(Protocol):
    """The weights of a checkpoint, under the names of the state dict of the transformers *ForCausalLM class."""

    def names(self) -> Collection[str]:
        """Every tensor that can be read; a tied `lm_head.weight` may be absent."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one tensor. Raises KeyError for a name that is not in `names()`."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` of the first axis: a copy on the CPU in the checkpoint's dtype (float32/float16/bfloat16).

        Raises CheckpointError where the file was cut off or changed since it was opened.
        """


class StoredTensors(TensorSource, Protocol):
    """A TensorSource under the names of the checkpoint, whatever it holds.

    `promised`: the tensors that an index puts into a file which does not have them, and that file.
    """

    promised: Mapping[str, Path]

    def is_floating(self, name: str) -> bool:
        """Whether the tensor holds floating-point numbers, which `rows` gives."""


@dataclass(frozen=True, slots=True)
class Shapes:
    """The tensors of `source` without what is in them: on PyTorch's meta device, where they take no memory."""

    source: TensorSource

    def names(self) -> Collection[str]:
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.shape(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        height, *rest = self.shape(name)
        return torch.empty((min(stop, height) - start, *rest), dtype=torch.bfloat16, device="meta")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Everything that a bundle carries for text: contents, not paths. `notes` says what was mended."""

    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    chat_template: str | None
    additional_chat_templates: dict[str, str]
    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened checkpoint. `kind` is huggingface, hub, gguf or random; `generation` is its generation_config.

    `task` is what its bundle is for; `pooling` says how a text is read where that is to score or to embed.
    `path` is the folder or file that it was read from, None where there is none. `left_out` are the stored tensors that
    the model has no place for; `notes` say so, and what else was decided. `packed` knows the tensors that are quantized
    already, None where there are none; `scheme` is the one of weights in blocks that is nearest to how they are.
    """

    kind: str
    name: str
    config: PreTrainedConfig
    tensors: TensorSource
    tokenizer: TokenizerFiles
    generation: dict[str, Any]
    path: Path | None = None
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    task: Task = "generate"
    pooling: Pooling | None = None
    packed: PackedSource | None = None
    scheme: str | None = None


@dataclass(frozen=True, slots=True)
class Skeleton:
    """What a model's class wants to be filled with: `shapes` by name; the names in `tied` may be absent."""

    class_name: str
    shapes: dict[str, tuple[int, ...]]
    tied: frozenset[str]


def skeleton_of(config: PreTrainedConfig) -> Skeleton:
    """The state dict of `config`'s class, on the meta device: no memory is taken.

    Raises UnsupportedModelError where transformers has no such class, or cannot build it.
    """
    import torch

    loader = auto_class(config)
    try:
        with torch.device("meta"):
            model = loader.from_config(config, trust_remote_code=False)
    except Exception as error:  # a class computes with the settings before it looks at them
        problem = f"transformers cannot build a {config.model_type!r} model: {one_line(error)}"
        raise UnsupportedModelError(problem) from error
    tied = getattr(model, "_tied_weights_keys", None) if config.tie_word_embeddings else None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return Skeleton(type(model).__name__, shapes, frozenset(tied or ()))


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config` in float32 with eager attention: parameters take no memory, buffers are real.

    Raises UnsupportedModelError where transformers has no such language model.
    """
    import torch
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers.initialization import no_init_weights

    with no_init_weights(), init_empty_weights(include_buffers=False):
        try:
            model = auto_class(config).from_config(
                config, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
            )
        except ValueError as error:
            message = f"{config.model_type}: transformers has no causal language model for it"
            raise UnsupportedModelError(message) from error
    model.tie_weights()  # what is registered without values is a parameter of its own, tied or not
    return model.eval()  # type: ignore[no-any-return]


def check_tensors(source: TensorSource, skeleton: Skeleton, where: str) -> None:
    """Check that `source` has every tensor of the model, in its shape.

    Raises CheckpointError naming the first one that is missing or of another shape; `where` is the file or folder.
    """
    present = set(source.names())
    for name, shape in skeleton.shapes.items():
        if name not in present:
            if name in skeleton.tied:
                continue
            raise CheckpointError(
                f"{where} has no tensor {name}, which {skeleton.class_name} needs: the checkpoint is not whole"
            )
        if source.shape(name) != shape:
            raise CheckpointError(
                f"{where}: tensor {name} is {list(source.shape(name))}, config.json wants {list(shape)}: no fit"
            )
