"""What the projections' inputs look like on real text: the greatest magnitude of every channel."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from starling.engine.progress import Advance
from starling.export.check.sample_texts import TokenRows
from starling.export.checkpoints.checkpoint import TensorSource
from starling.export.quantization.streamed_model import StreamedModel


def input_absmax(
    config: PreTrainedConfig, tensors: TensorSource, rows: TokenRows, progress: Advance | None = None
) -> Mapping[str, Tensor]:
    """The greatest |x| of every input channel of every nn.Linear over the text of `rows`.

    Returns float32 [columns] under the name of the projection's weight. The checkpoint is read once; memory holds one
    module's weights and the activations of all rows.

    Raises:
        CheckpointError: the checkpoint was cut off or changed since it was opened.
    """
    streamed = StreamedModel(config, tensors, progress)
    found: dict[str, Tensor] = {}

    def look(weight: str, x: Tensor) -> None:
        found[weight] = _absmax(x, rows.lengths)

    for name, module in streamed.model.base_model.named_modules(prefix=streamed.model.base_model_prefix):
        if isinstance(module, nn.Linear):
            streamed.watch(name, partial(look, f"{name}.weight"))
    hidden = _absmax(streamed.run(rows.ids), rows.lengths)
    head: nn.Linear = streamed.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return found | {name: hidden for name in _names_of(streamed.model, head.weight)}


def _absmax(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Over the text of all rows of x [rows, length, columns]; row by row, so that no copy of x is made."""
    of_rows = [row[:length].abs().amax(dim=0) for row, length in zip(x, lengths, strict=True)]
    return torch.stack(of_rows).amax(dim=0).clone()


def _names_of(model: nn.Module, parameter: Tensor) -> list[str]:
    """All names of a parameter: lm_head's weight may be the embedding's."""
    return [name for name, p in model.named_parameters(remove_duplicate=False) if p is parameter]
