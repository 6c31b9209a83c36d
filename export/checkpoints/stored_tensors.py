"""The weights of a Hugging Face folder under the names that are stored: which files hold them, and their rows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from starling.engine.errors import CheckpointError
from starling.export.tokenizers.tokenizer_files import read_json

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class _Entry:
    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: F32, BF16, I64, …


class SafetensorsFiles:
    """StoredTensors over safetensors files, each opened for one call only, so that no mapped pages pile up.

    `file` is the one that names the others, or the only one.
    """

    def __init__(self, file: Path, entries: dict[str, _Entry], promised: dict[str, Path]) -> None:
        self.file = file
        self.promised: Mapping[str, Path] = promised
        self._entries = entries

    def names(self) -> Collection[str]:
        """See TensorSource."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """See TensorSource."""
        return self._entries[name].shape

    def is_floating(self, name: str) -> bool:
        """See StoredTensors."""
        return self.dtype(name).startswith(("F", "BF"))

    def dtype(self, name: str) -> str:
        """The type of a tensor's numbers as safetensors spells it: F32, BF16, I64, …"""
        return self._entries[name].dtype

    def columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns `start:stop` of a matrix, a copy; raises what `rows` raises."""
        with _opened(self._entries[name].file, "pt") as file:
            columns: torch.Tensor = file.get_slice(name)[:, start:stop].clone()
        return columns

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See TensorSource. Floats of other widths than a TensorSource has come as float32, as PyTorch casts them."""
        with _opened(self._entries[name].file, "pt") as file:
            # A clone: the slice may be a view of the mapped file, which would keep it mapped.
            is_one = not self._entries[name].shape
            rows: torch.Tensor = (file.get_tensor(name) if is_one else file.get_slice(name)[start:stop]).clone()
        wide = self.is_floating(name) and self._entries[name].dtype not in ("F32", "F16", "BF16")
        return rows.float() if wide else rows


def open_safetensors(folder: Path, named: str | None = None) -> SafetensorsFiles:
    """Find the weights of a folder where transformers does, and check every header and length.

    `named` is the file that config.json names (its `transformers_weights`), which goes before the usual ones.
    Raises CheckpointError naming the file that is missing, truncated or altered.
    """
    if named is not None and Path(named).name != named:
        raise CheckpointError(f"{folder / 'config.json'}: transformers_weights is {named!r}, which is no file name")
    for name in [named] if named is not None else [SINGLE_FILE, INDEX_FILE]:
        path = folder / name
        if path.is_file():
            return _indexed(path) if name.endswith(".json") else SafetensorsFiles(path, _entries_of(path), {})
    if named is not None:
        raise CheckpointError(f"{folder / named} is missing, which config.json names: get the whole checkpoint again")
    if pickles := sorted([*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt")]):
        raise CheckpointError(
            f"{folder} has only {pickles[0].name}, a pickle that can run code when read: if you trust it, convert it "
            "with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER); a reward "
            "model's v_head would be lost so: torch.load it with weights_only=True, and safetensors.torch.save_file"
        )
    raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}: give the folder of a whole checkpoint")


def _indexed(index: Path) -> SafetensorsFiles:
    """Every tensor of every file that the index names, whether it names the tensor or not; of two the later file's."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: get the file again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} names {shard!r}, which is not a file name: get the file again")
    entries: dict[str, _Entry] = {}
    for shard in sorted(set(weight_map.values())):
        entries |= _entries_of(index.parent / shard)
    promised = {name: index.parent / shard for name, shard in weight_map.items() if name not in entries}
    return SafetensorsFiles(index, entries, promised)


def _entries_of(path: Path) -> dict[str, _Entry]:
    entries = {}
    with _opened(path, "np") as file:  # a header is the same to either, and PyTorch takes seconds to load
        for name in file.keys():  # noqa: SIM118 (a safe_open handle is no mapping)
            tensor = file.get_slice(name)
            entries[name] = _Entry(path, tuple(tensor.get_shape()), tensor.get_dtype())
    return entries


@contextmanager
def _opened(path: Path, framework: str) -> Iterator[Any]:
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: get the whole checkpoint again") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or altered ({error}): get the file again") from error
