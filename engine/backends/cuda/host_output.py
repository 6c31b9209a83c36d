"""What a step leaves for the host: the chosen tokens, and the logits where somebody asks for them."""

from __future__ import annotations

import numpy as np

from starling.engine.backends.cuda.cuda_device import address_of
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.logits import HOST_TYPES, Logits, logits_reader


class HostLogits:
    """Page-locked memory for logits [rows, vocab], read as float32."""

    def __init__(self, memory: DeviceMemory, kind: str, rows: int, vocab_size: int) -> None:
        self._memory, self._kind = memory, kind
        self._raw = memory.host((rows, vocab_size), HOST_TYPES[kind])
        self._float32 = self._raw if kind == "float32" else np.zeros(self._raw.shape, np.float32)

    def fetch(self, address: int, rows: int) -> Logits:
        """What the newest step left at the device address for its first `rows` rows; valid until the next call."""
        raw = self._raw[:rows]
        self._memory.copy(address_of(raw), address, raw.nbytes)
        self._memory.synchronize()
        return logits_reader(raw, self._float32[:rows], self._kind)()


class DeviceOutput:
    """A step's output, valid until the backend's next call."""

    def __init__(self, tokens: list[int], logits: HostLogits, address: int) -> None:
        """`address`: where the step's logits are on the device."""
        self._tokens, self._logits, self._address = tokens, logits, address

    def tokens(self) -> list[int]:
        """The token chosen on the device for each row; -1 for a row of logits that are not numbers."""
        return self._tokens

    def logits(self) -> Logits:
        """Float32 [rows, vocab], copied from the device by this call."""
        return self._logits.fetch(self._address, len(self._tokens))
