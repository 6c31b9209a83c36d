"""Run the PyTorch model with the weights of one module in memory at a time, so that its size does not matter."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from starling.engine.progress import Advance
from starling.export.checkpoints.checkpoint import TensorSource, empty_model

_CHUNK_ELEMENTS = 8 * 1024 * 1024  # rows are read in pieces of this size

#: Called with the bytes of the model's float32 weights that have passed, and their total.


class StreamedModel:
    """The decoder of `config` in float32, without lm_head, whose modules fetch their parameters as they run.

    Every module's own parameters are read from `tensors` right before its forward and dropped right after; of the
    embedding only the rows that are asked for. One pass over all of the text reads the checkpoint once.
    """

    def __init__(self, config: PreTrainedConfig, tensors: TensorSource, progress: Advance | None = None) -> None:
        self.model = empty_model(config)
        self._tensors, self._progress, self._done = tensors, progress, 0
        self._names = _stored_names(self.model, tensors)
        self._kept: dict[nn.Module, dict[str, nn.Parameter | None]] = {}
        decoder = self.model.base_model
        self._total = 4 * sum(p.numel() for p in decoder.parameters())
        for module in decoder.modules():
            if module._parameters:
                fetch = self._fetch_rows if isinstance(module, nn.Embedding) else self._fetch
                module.register_forward_pre_hook(fetch)
                module.register_forward_hook(self._drop, always_call=True)

    def watch(self, name: str, look: Callable[[Tensor], None]) -> None:
        """Show `look` the input [rows, length, columns] of the module called `name`, each time it runs."""
        self.before(name, lambda _, x, *__: look(x))

    def before(self, name: str, act: Callable[..., None]) -> None:
        """Call `act` with the module called `name` and its inputs, each time before it runs.

        Its parameters are there, and `act` may change them: the module runs with what they are then.
        """
        self.model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: act(module, *inputs))

    def run(self, ids: Tensor) -> Tensor:
        """The last hidden state [rows, length, hidden] after `ids` int64 [rows, length]; what lm_head would read."""
        with torch.inference_mode():
            return self.model.base_model(input_ids=ids, use_cache=False)[0]  # type: ignore[no-any-return]

    def _fetch(self, module: nn.Module, _: Any) -> None:
        self._kept[module] = dict(module._parameters)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                whole = torch.empty(parameter.shape)
                for start, piece in self._pieces(parameter):
                    whole[start : start + len(piece)] = piece
                module._parameters[name] = nn.Parameter(whole, requires_grad=False)

    def _fetch_rows(self, module: nn.Embedding, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Put only the needed rows of the table in place, and number the ids anew."""
        self._kept[module] = dict(module._parameters)
        needed, ids = torch.unique(inputs[0], return_inverse=True)
        module.padding_idx = None  # it counts rows of the whole table, and matters in training only
        rows = torch.empty(len(needed), module.embedding_dim)
        for start, piece in self._pieces(module.weight):
            here = (needed >= start) & (needed < start + len(piece))
            rows[here] = piece[needed[here] - start].float()
        module._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        return (ids, *inputs[1:])

    def _drop(self, module: nn.Module, *_: Any) -> None:
        module._parameters.update(self._kept.pop(module))

    def _pieces(self, parameter: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows) of the checkpoint's tensor behind a parameter, in its own dtype."""
        name = self._names[parameter]
        count, *rest = self._tensors.shape(name)
        step = max(1, _CHUNK_ELEMENTS // math.prod(rest))
        for start in range(0, count, step):
            piece = self._tensors.rows(name, start, min(start + step, count))
            self._done += 4 * piece.numel()
            if self._progress is not None:
                self._progress(self._done, self._total)
            yield start, piece


def _stored_names(model: nn.Module, tensors: TensorSource) -> dict[Tensor, str]:
    """The checkpoint's name of every parameter; one that is tied has the name that is stored."""
    have = set(tensors.names())
    names: dict[Tensor, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in have:
            names.setdefault(parameter, name)
    return names
