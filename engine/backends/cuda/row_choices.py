"""How each row's tokens are chosen on the device: written there once per prompt, read by every step."""

from __future__ import annotations

from starling.engine.backends.backend import GREEDY, DeviceChoice
from starling.engine.backends.cuda.cuda_device import address_of
from starling.engine.backends.cuda.device_memory import DeviceMemory
from starling.engine.backends.cuda.step_tensors import RowTensors
from starling.engine.names import MIN_P, NOISE, TEMPERATURE, TOP_K, TOP_P

_DTYPES = {TEMPERATURE: "float32", TOP_K: "int64", TOP_P: "float32", MIN_P: "float32"}


class RowChoices:
    """Temperature, top_k, top_p, where there is one min_p, and the random numbers of every row. Rows begin greedy."""

    def __init__(self, memory: DeviceMemory, tensors: RowTensors, rows: int, positions: int) -> None:
        self._memory, self._tensors, self._positions = memory, tensors, positions
        self._settings = {
            name: memory.host((rows,), dtype) for name, dtype in _DTYPES.items() if name in tensors.addresses
        }
        self._noise = memory.host((positions,), "float32")
        for row in range(rows):
            self.write(row, GREEDY, 0)

    def write(self, row: int, choice: DeviceChoice, first: int) -> None:
        """From now on choose as `choice` says; its first random number is for the step that writes position `first`.

        The stream must be idle.
        """
        for name, host in self._settings.items():
            host[row] = getattr(choice, name)
            self._memory.copy(self._tensors.row(name, row), address_of(host[row:]), host.itemsize)
        if choice.top_k != 1:
            self._noise[first:] = choice.noise(self._positions - first)
            self._memory.copy(self._tensors.row(NOISE, row), address_of(self._noise), self._noise.nbytes)
