"""config.pbtxt, Triton's model configuration, as text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from starling.serving.triton.entry_inputs import Tensor

InstanceKind = Literal["cpu", "gpu"]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Triton's configuration of one model on the Python backend: one instance, no batching by Triton."""

    name: str
    comment: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    batched: bool = False
    decoupled: bool = False
    kind: InstanceKind = "cpu"
    parameters: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The file's content."""
        group = "count: 1 kind: KIND_GPU gpus: [ 0 ]" if self.kind == "gpu" else "count: 1 kind: KIND_CPU"
        return "\n".join(
            [
                *(f"# {line}" for line in self.comment.splitlines()),
                f'name: "{self.name}"',
                'backend: "python"',
                # The scheduler of the engine batches; a request has one row.
                f"max_batch_size: {int(self.batched)}",
                *(["model_transaction_policy { decoupled: true }"] if self.decoupled else []),
                f"instance_group [ {{ {group} }} ]",
                *_tensors("input", self.inputs),
                *_tensors("output", self.outputs),
                *(_parameter(name, value) for name, value in self.parameters.items()),
                "",
            ]
        )


def _tensors(kind: str, tensors: Sequence[Tensor]) -> list[str]:
    lines = []
    for tensor in tensors:
        dims = ", ".join(map(str, tensor.dims))
        optional = " optional: true" if kind == "input" and tensor.optional else ""
        lines.append(f'  {{ name: "{tensor.name}" data_type: TYPE_{tensor.dtype} dims: [ {dims} ]{optional} }}')
    return [f"{kind} [", ",\n".join(lines), "]"]


def _parameter(name: str, value: str) -> str:
    # Text format's string escapes are those of JSON where all is ASCII or left as UTF-8.
    return f'parameters {{ key: "{name}" value {{ string_value: {json.dumps(value, ensure_ascii=False)} }} }}'
