"""Quantize a model's projections one after another, each on the inputs that the quantized ones before it make."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig

from starling.engine.progress import Advance
from starling.export.check.sample_texts import TokenRows, text_mask, text_pieces
from starling.export.checkpoints.checkpoint import TensorSource
from starling.export.quantization.block_store import BlockStore
from starling.export.quantization.blocks import BlockQuantization, dequantize, quantize_rows
from starling.export.quantization.gptq import ErrorFeedback, compensate, error_feedback
from starling.export.quantization.streamed_model import StreamedModel

#: An expert that fewer tokens were sent to is rounded: so few inputs say too little of the others.
LEAST_EXPERT_TOKENS = 128
_EXPERTS = ("gate_up_proj", "down_proj")


class BlockCalibration:
    """One pass of `rows` through the model, after which `store` has every matrix that `wanted` names.

    `wanted` says how each of the checkpoint's tensors is quantized. The checkpoint is read once; memory holds one
    module's weights, the activations of all rows and two matrices of the widest input by itself.
    """

    def __init__(self, rows: TokenRows, wanted: Mapping[str, BlockQuantization], store: BlockStore) -> None:
        self._rows, self._wanted, self._store = rows, wanted, store
        self._is_text = text_mask(rows)
        self._input: Callable[[], Tensor | None] = lambda: None
        self._feedback: ErrorFeedback | None = None
        self.rounded_experts = 0

    def run(self, config: PreTrainedConfig, tensors: TensorSource, progress: Advance | None = None) -> None:
        """Quantize.

        Raises:
            CheckpointError: the checkpoint was cut off or changed since it was opened.
        """
        streamed = StreamedModel(config, tensors, progress)
        for name, module in streamed.model.base_model.named_modules(prefix=streamed.model.base_model_prefix):
            if isinstance(module, nn.Linear) and f"{name}.weight" in self._wanted:
                streamed.before(name, partial(self._linear, f"{name}.weight"))
            elif f"{name}.{_EXPERTS[0]}" in self._wanted:
                streamed.before(name, partial(self._experts, name))
        streamed.run(self._rows.ids)

    def _linear(self, name: str, module: nn.Module, x: Tensor) -> None:
        how, weight = self._wanted[name], module._parameters["weight"]
        assert weight is not None
        if how.bits == 8:  # the weight file rounds it by itself
            weight.copy_(dequantize(quantize_rows(weight, how), how, weight.shape[1]))
            return
        if self._input() is not x:  # query, key and value read the same
            self._feedback = None  # before the next one is made: a wide one takes a gigabyte
            self._feedback = error_feedback(text_pieces(x, self._rows), x.shape[-1])
            self._input = weakref.ref(x)
        assert self._feedback is not None
        self._store.put(name, compensate(weight, self._feedback, how))

    def _experts(self, name: str, module: nn.Module, x: Tensor, chosen: Tensor, *_: Tensor) -> None:
        """Each expert of a layer on the tokens x [tokens, hidden] that were sent to it: `chosen` [tokens, k]."""
        text = self._is_text.flatten()[:, None]
        count: int = getattr(module, _EXPERTS[0]).shape[0]
        for expert in range(count):
            inputs = x[((chosen == expert) & text).any(dim=1)]
            if len(inputs) < LEAST_EXPERT_TOKENS:
                self.rounded_experts += 1
                continue
            for part in _EXPERTS:
                matrix = getattr(module, part)[expert]
                matrix = matrix.T if module.is_transposed else matrix
                how = self._wanted[f"{name}.{part}"]
                found = compensate(matrix, error_feedback([inputs], inputs.shape[1]), how)
                self._store.put(f"{name}.{part}", found, expert)
                if part == _EXPERTS[0]:
                    bias = getattr(module, f"{part}_bias")[expert] if module.has_bias else None
                    inputs = module._apply_gate(functional.linear(inputs, matrix, bias))  # type: ignore[operator]
