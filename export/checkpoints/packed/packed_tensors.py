"""A Hugging Face folder with quantized weights: read as if it had their values, and known as what they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping

from torch import Tensor

from starling.engine.errors import CheckpointError, UnsupportedModelError
from starling.export.checkpoints.packed.packed_layouts import packed_weights
from starling.export.checkpoints.packed.packed_weight import PackedWeight
from starling.export.checkpoints.packed.packing_settings import PackingSettings
from starling.export.checkpoints.placement import PlacedTensors
from starling.export.checkpoints.stored_grid import StoredGrid, StoredRows
from starling.export.checkpoints.stored_tensors import SafetensorsFiles

# Scales and zero points of activations and of the KV cache, of which notes of PackingSettings speak.
_OF_ACTIVATIONS = re.compile(r"(^|\.)((input|output|activation)_(scale(_inv)?|zero_point|global_scale)|[qkv]_scale)$")


class PackedTensors:
    """StoredTensors over a folder's files, with MODULE.weight, in float32, for the tensors that are packed of it."""

    def __init__(self, files: SafetensorsFiles, settings: PackingSettings) -> None:
        """Raises what `packed_weights` raises, and UnsupportedModelError where nothing is quantized after all."""
        self._files, self.file, self.promised = files, files.file, files.promised
        self.weights = {f"{module}.weight": weight for module, weight in packed_weights(files, settings).items()}
        if not self.weights:
            raise UnsupportedModelError(
                f"{files.file} has no weights that are quantized by {settings.method}, config.json says so: remove its "
                "quantization_config if they are not"
            )
        parts = {part for weight in self.weights.values() for part in weight.parts}
        own = [name for name in files.names() if name not in parts]
        self.left_out = tuple(name for name in own if _OF_ACTIVATIONS.search(name))
        aside = set(self.left_out)
        self._names = [*(name for name in own if name not in aside), *self.weights]
        self.notes = settings.notes
        if self.left_out:
            count, first = len(self.left_out), self.left_out[0]
            self.notes += (f"left out: {count} scales of activations or of the KV cache, such as {first}",)

    def names(self) -> Collection[str]:
        """See TensorSource."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        weight = self.weights.get(name)
        return self._files.shape(name) if weight is None else weight.shape

    def is_floating(self, name: str) -> bool:
        """See StoredTensors."""
        return name in self.weights or self._files.is_floating(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See TensorSource. Raises CheckpointError where a number is not finite, too."""
        weight = self.weights.get(name)
        if weight is None:
            return self._files.rows(name, start, stop)
        values = weight.values(start, min(stop, weight.shape[0]))
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"{self.file}: tensor {name} has numbers that are not finite: get the file again")
        return values

    @property
    def scheme(self) -> str:
        """The scheme of weights in blocks that is nearest to most of them."""
        (label, _), *_ = Counter(weight.label for weight in self.weights.values()).most_common()
        return "int4" if "int4" in label else "int8"


class PlacedPacking:
    """A PackedSource: what is packed in the tensors that have their place in a model."""

    def __init__(self, placed: PlacedTensors, weights: Mapping[str, PackedWeight]) -> None:
        self._placed, self._weights = placed, weights

    def packing(self, name: str) -> str | None:
        """See PackedSource."""
        made_of = self._placed.sources(name)
        return next((self._weights[each].label for each in made_of if each in self._weights), None)

    def grid(self, name: str) -> StoredGrid | None:
        """See PackedSource. What transformers makes of several tensors, such as stacked experts, has none."""
        weight = self._weights.get(self._placed.stored_name(name) or "")
        return None if weight is None else weight.grid()

    def stored_rows(self, name: str, start: int, stop: int) -> StoredRows:
        """See PackedSource."""
        return self._weights[self._placed.stored_name(name) or ""].stored(start, stop)
