"""Everything that the backend holds on a device, allocated once and freed together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy.typing as npt

from starling.engine.backends.cuda.cuda_device import Device, HostArray


class DeviceMemory:
    """Allocations on `device` and on one stream of it, freed by `close` in the reverse order."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._owned = ExitStack()
        self.stream = device.create_stream()
        self._owned.callback(device.destroy_stream, self.stream)

    def allocate(self, size: int) -> int:
        """Address of `size` zeroed bytes (at least one) on the device."""
        address = self.device.allocate(max(size, 1))
        self._owned.callback(self.device.free, address)
        self.device.zero(address, max(size, 1), self.stream)
        return address

    def host(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> HostArray:
        """A zeroed array in page-locked host memory."""
        array = self.device.host_array(shape, dtype)
        self._owned.callback(self.device.free_host, array)
        return array

    def event(self) -> int:
        event = self.device.create_event()
        self._owned.callback(self.device.destroy_event, event)
        return event

    def capture(self, work: Callable[[], None]) -> int:
        """A graph of what `work` puts on the stream."""
        graph = self.device.capture(self.stream, work)
        self._owned.callback(self.device.destroy_graph, graph)
        return graph

    def copy(self, destination: int, source: int, size: int) -> None:
        """Copy on the stream."""
        self.device.copy(destination, source, size, self.stream)

    def synchronize(self) -> None:
        """Wait until everything on the stream is done."""
        self.device.synchronize(self.stream)

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self._owned.close()
