"""A `tensorrt` bundle's reference graph, run by hand: every input is the test's own, as a backend would feed it."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime  # type: ignore[import-untyped]

from starling.engine.bundle.manifest import Bundle

TYPES = {"float16": np.float16, "float32": np.float32}
Ints = npt.NDArray[np.int64]


class ReferenceGraph:
    """A KV cache of `rows` rows of `positions` positions, and steps over the rows that are asked for."""

    def __init__(self, folder: Path, *, rows: int, positions: int) -> None:
        self.bundle = Bundle.open(folder)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(str(self.bundle.reference_path), options)
        arch, kind = self.bundle.architecture, TYPES[self.bundle.kv_cache.dtype]
        shape = (rows, arch.kv_heads, positions, arch.head_dim)
        names = [f"{i}.{side}" for i in range(arch.layers) for side in ("key", "value")]
        # not zeros: what lies after a row's valid positions must not matter
        self.cache = {name: np.full(shape, 7, kind) for name in names}
        self.noise = np.zeros((rows, positions), np.float32)

    def step(
        self, rows: slice, ids: npt.ArrayLike, past_lengths: npt.ArrayLike, **choice: float
    ) -> dict[str, npt.NDArray[Any]]:
        """Write `ids` [k, n] after the first `past_lengths` [k] positions of k rows; logits as float32 [k, vocab].

        `choice`: temperature, top_k, top_p of all rows; greedy unless given.
        """
        lengths = np.asarray(past_lengths, np.int64)
        settings = {"temperature": 1.0, "top_k": 1, "top_p": 1.0} | choice
        feeds = {"input_ids": np.asarray(ids, np.int64), "past_lengths": lengths, "noise": self.noise[rows]}
        for name, value in settings.items():
            feeds[name] = np.full(lengths.shape, value, np.int64 if name == "top_k" else np.float32)
        feeds |= {f"past_key_values.{name}": buffer[rows] for name, buffer in self.cache.items()}
        names = [output.name for output in self._session.get_outputs()]
        outputs = dict(zip(names, self._session.run(names, feeds), strict=True))
        for name, buffer in self.cache.items():
            buffer[rows] = outputs.pop(f"present.{name}")
        outputs["logits"] = outputs["logits"][:, 0].astype(np.float32)
        return outputs
