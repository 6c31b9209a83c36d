"""The stored tensors of a module with a quantized weight: what does not fit together is refused here."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from starling.engine.errors import CheckpointError, UnsupportedModelError
from starling.export.checkpoints.packed.packed_weight import Read
from starling.export.checkpoints.packed.packing_settings import WHOLE_BITS
from starling.export.checkpoints.stored_tensors import SafetensorsFiles


@dataclass(frozen=True, slots=True)
class PackedModule:
    """The stored tensors of a module."""

    files: SafetensorsFiles
    name: str

    def has(self, part: str) -> bool:
        """Whether there is such a tensor. Raises CheckpointError where an index says so and its file has none."""
        name = f"{self.name}.{part}"
        if name in self.files.promised:
            raise CheckpointError(
                f"{self.files.promised[name]} has no tensor {name}, which {self.files.file} puts there: get it again"
            )
        return name in self.files.names()

    def part(self, part: str, types: tuple[str, ...]) -> str:
        """The whole name of a tensor. Raises CheckpointError where it is missing, or is of another type."""
        name = f"{self.name}.{part}"
        if not self.has(part):
            raise CheckpointError(
                f"{self.files.file} has no tensor {name}, without which {self.name} cannot be dequantized: get the "
                "whole checkpoint again"
            )
        if (found := self.files.dtype(name)) not in types:
            raise CheckpointError(f"{self.files.file}: tensor {name} is {found}, not {' or '.join(types)}: no fit")
        return name

    def shaped(self, part: str, types: tuple[str, ...], shape: tuple[int, ...]) -> str:
        """The same, of this shape."""
        name = self.part(part, types)
        if (found := self.files.shape(name)) != shape:
            raise CheckpointError(
                f"{self.files.file}: tensor {name} is {list(found)}, its quantization wants {list(shape)}: no fit"
            )
        return name

    def matrix(self, part: str, types: tuple[str, ...]) -> tuple[str, int, int]:
        """The same, and its height and width."""
        name = self.part(part, types)
        shape = self.files.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(f"{self.files.file}: tensor {name} is {list(shape)}, which is no matrix: no fit")
        return name, shape[0], shape[1]

    def group(self, inputs: int, groups: int, sizes: tuple[int, ...]) -> int:
        """How many inputs share a scale, of `sizes`. Raises CheckpointError where none makes so many groups."""
        whole = [inputs if size == -1 else min(size, inputs) for size in sizes]
        if not sizes and groups and inputs % groups == 0:
            return inputs // groups
        size = next((size for size in whole if -(-inputs // size) == groups), None)
        if size is None:
            said = f" in groups of {' or '.join(map(str, whole))}" if sizes else ""
            raise CheckpointError(
                f"{self.files.file}: {self.name} has {groups} scales a row for {inputs} inputs{said}: no fit"
            )
        return size

    def places(self, part: str, inputs: int, groups: int, group: int, *, wanted: bool) -> Tensor | None:
        """The group of each input, None where they are in order, as they are where nothing is said or `wanted`."""
        if not self.has(part) and not (wanted and groups > 1):
            return None
        places = self.files.rows(self.shaped(part, ("I32", "I64"), (inputs,)), 0, inputs).long()
        for place in (int(places.min()), int(places.max())):
            if not 0 <= place < groups:
                raise CheckpointError(f"{self.files.file}: {self.name}.{part} names group {place} of {groups}: no fit")
        return None if torch.equal(places, torch.arange(inputs) // group) else places

    def columns(self, name: str) -> Read:
        """Reads a tensor's columns, as rows."""
        return lambda start, stop: self.files.columns(name, start, stop).T

    def rows(self, name: str) -> Read:
        """Reads a tensor's rows."""
        return lambda start, stop: self.files.rows(name, start, stop)

    def by_row(self, name: str, outputs: int) -> tuple[Read, int]:
        """Reads what a tensor has for each row and group [n, groups]; a single number is for all."""
        shape = self.files.shape(name)
        if shape in ((), (1,), (1, 1)):
            one = self.files.rows(name, 0, 1).reshape(1, 1)
            return lambda start, stop: one.expand(stop - start, 1), 1
        if shape[0] != outputs or len(shape) > 2 or 0 in shape:
            raise CheckpointError(
                f"{self.files.file}: tensor {name} is {list(shape)}, which is not for {outputs} rows: no fit"
            )
        groups = shape[1] if len(shape) == 2 else 1
        return lambda start, stop: self.files.rows(name, start, stop).reshape(-1, groups), groups

    def require_bits(self, bits: int, said: tuple[int, ...]) -> None:
        """Raise UnsupportedModelError for a width that cannot be read, CheckpointError for one that is not `said`."""
        if bits not in WHOLE_BITS:
            raise UnsupportedModelError(
                f"{self.files.file}: {self.name} has {bits} bits a weight; 4 and 8 can be read: export the "
                "unquantized checkpoint"
            )
        if bits not in said:
            listed = " or ".join(map(str, said))
            raise CheckpointError(f"{self.files.file}: {self.name} has {bits} bits a weight, not {listed}: no fit")
