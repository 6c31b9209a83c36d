"""One set of random weights for PyTorch and for ONNX Runtime: drawn in a PyTorch model, written into a bundle.

So the KL between the two means something, and gigabytes of weights need not be carried.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from starling.engine.bundle.manifest import ALWAYS_HASHED_BYTES, Bundle
from starling.export.checkpoints.random_checkpoint import starling_config
from starling.export.quantization.blocks import BlockQuantization, quantize_rows
from starling.profiling.gpu.stages import LAYOUT, SHARED
from starling.profiling.gpu.stages.kit import Kit

WEIGHT_FILE = "model.onnx.data"
_SEED = 7
_TYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "uint8": torch.uint8,
}
#: Ends of the names of a graph's initializers, after "weight", and what is stored there.
_PIECES = {
    "_zero_points": "zero_points",
    "_scales": "scales",
    "_q8_rows": "data",
    "_q4_rows": "data",
    "_q8": "data",
    "_q4": "data",
    "_t": "transposed",
}
_COPIED_BYTES, _MOST_WAITING, _WRITERS = 16 << 20, 64, 8


def random_model(name: str, dtype: torch.dtype, device: str, *, window: bool = True) -> Any:
    """The transformers model of a built-in configuration; without `window` it attends to everything before."""
    from transformers import MistralForCausalLM

    torch.manual_seed(_SEED)
    config = starling_config(name)
    if not window:
        config.sliding_window = None
    with torch.device("meta"):
        model: Any = MistralForCausalLM(config)
    model = model.to(dtype).to_empty(device=device).eval()
    assert config.head_dim is not None
    _set_frequencies(model, _frequencies(config.head_dim, device))
    spread = config.initializer_range
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
                continue
            ends_a_branch = key.endswith(("o_proj.weight", "down_proj.weight"))
            parameter.normal_(std=spread / math.sqrt(2 * config.num_hidden_layers) if ends_a_branch else spread)
    model.config._attn_implementation = "sdpa"
    return model


def _frequencies(head_dim: int, device: str) -> torch.Tensor:
    return 1.0 / (10000.0 ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim))


def _set_frequencies(model: Any, frequencies: torch.Tensor) -> None:
    """Buffers that no state dict has are empty in a model from the meta device."""
    for module in model.modules():
        for name in ("inv_freq", "original_inv_freq"):
            if isinstance(getattr(module, name, None), torch.Tensor):
                setattr(module, name, frequencies.clone())


def fill_bundle(kit: Kit, name: str, model: Any) -> Bundle:
    """The bundle `name` with the weights of `model`, in kit.work; its bundle.json has the weight file as it is then."""
    begin = perf_counter()
    folder = kit.work / name
    for source in (kit.graphs / SHARED, kit.graphs / name):
        shutil.copytree(source, folder, dirs_exist_ok=True)
    layout = json.loads((folder / LAYOUT).read_text(encoding="utf-8"))
    (folder / LAYOUT).unlink()
    manifest = kit.manifest(name)
    in_8_bits = {_members(w["name"])[0] for w in layout["weights"] if w["name"].endswith(("_q8", "_q8_rows"))}
    values = _Values(model.state_dict(), manifest["quantization"], manifest["architecture"]["head_dim"], in_8_bits)
    file = folder / WEIGHT_FILE
    _write(file, layout, values)
    _record(folder, manifest, file)
    kit.results.write(bundle=name, bytes=layout["bytes"], fill_s=round(perf_counter() - begin, 1))
    return Bundle.open(folder)


def bytes_per_token(kit: Kit, name: str) -> int:
    """Bytes of weights that a token on CUDA reads."""
    layout = json.loads((kit.graphs / name / LAYOUT).read_text(encoding="utf-8"))
    return int(layout["bytes_per_token"])


def _record(folder: Path, manifest: dict[str, Any], file: Path) -> None:
    """Bundle.open checks the digest of smaller files alone: gigabytes would take seconds of the card's time."""
    size = file.stat().st_size
    digest = hashlib.sha256(file.read_bytes()).hexdigest() if size <= ALWAYS_HASHED_BYTES else "not taken"
    manifest["files"][file.name] = {"bytes": size, "sha256": digest}
    manifest["files"] = {key: value for key, value in manifest["files"].items() if (folder / key).is_file()}
    (folder / "bundle.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _write(file: Path, layout: dict[str, Any], values: _Values) -> None:
    """All weights at their places; what lies between them is zero."""
    file.unlink(missing_ok=True)
    with file.open("wb") as empty:
        empty.truncate(layout["bytes"])
    out = np.memmap(file, np.uint8, "r+")

    def put(start: int, content: npt.NDArray[np.uint8]) -> None:
        out[start : start + content.size] = content

    waiting: list[Future[None]] = []
    with ThreadPoolExecutor(_WRITERS) as pool:
        for weight in layout["weights"]:
            content = values.bytes(weight)
            for start in range(0, content.size, _COPIED_BYTES):
                piece = content[start : start + _COPIED_BYTES]
                waiting.append(pool.submit(put, weight["offset"] + start, piece))
            while len(waiting) > _MOST_WAITING:
                waiting.pop(0).result()
        for last in waiting:
            last.result()


@dataclass(slots=True)
class _Values:
    """What a graph's initializers hold, from a model's state dict."""

    state: dict[str, torch.Tensor]
    quantization: dict[str, Any] | None
    head_dim: int
    in_8_bits: Set[tuple[str, ...]]
    _quantized: tuple[tuple[str, ...], dict[str, torch.Tensor]] | None = None

    def bytes(self, weight: dict[str, Any]) -> npt.NDArray[np.uint8]:
        """Of one weight of the layout."""
        value = self._value(weight["name"], weight["shape"]).to(_TYPES[weight["dtype"]])
        content: npt.NDArray[np.uint8] = value.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
        if content.size != weight["length"]:
            raise ValueError(f"{weight['name']} has {content.size} bytes, the graph wants {weight['length']}")
        return content

    def _value(self, name: str, shape: list[int]) -> torch.Tensor:
        if name.startswith("rotary_"):
            return self._rotary(shape[0], name.endswith("cos"))
        members, piece = _members(name)
        if piece in ("data", "scales", "zero_points"):
            return self._pieces(members)[piece]
        rows = self._rows(members)
        return rows.T if piece == "transposed" else rows

    def _rows(self, members: tuple[str, ...]) -> torch.Tensor:
        return torch.cat([self.state[member] for member in members])

    def _pieces(self, members: tuple[str, ...]) -> dict[str, torch.Tensor]:
        """Quantized rows; their pieces are asked for one after another."""
        if self._quantized is None or self._quantized[0] != members:
            assert self.quantization is not None
            how = BlockQuantization(
                self.quantization["scheme"], self.quantization["block_size"], self.quantization["symmetric"]
            )
            pieces = quantize_rows(self._rows(members), how.at(8) if members in self.in_8_bits else how)
            self._quantized = members, dict(zip(("data", "scales", "zero_points"), pieces, strict=True))
        return self._quantized[1]

    def _rotary(self, positions: int, cosine: bool) -> torch.Tensor:
        device = next(iter(self.state.values())).device
        angles = torch.arange(positions, device=device).float()[:, None] * _frequencies(self.head_dim, str(device))
        return angles.cos() if cosine else angles.sin()


def _members(initializer: str) -> tuple[tuple[str, ...], str]:
    """The tensors of the state dict that an initializer is made of, and what is stored of them."""
    for ending, piece in _PIECES.items():
        if initializer.endswith(f"weight{ending}"):
            return tuple(_joined(initializer.removesuffix(ending))), piece
    return tuple(_joined(initializer)), "rows"


def _joined(name: str) -> Iterator[str]:
    """q_proj+k_proj.weight is q_proj.weight and k_proj.weight."""
    stem, _, ending = name.rpartition(".")
    parent, _, projections = stem.rpartition(".")
    for projection in projections.split("+"):
        yield ".".join(word for word in (parent, projection, ending) if word)
