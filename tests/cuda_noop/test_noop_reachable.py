"""What the GPU kit's small ONNX Runtime has of machine code is all that its graphs launch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from noop_cuda import counted, kernels, opened

from starling.engine.backends.onnxruntime.cuda_session import KERNELS_SWITCH
from starling.profiling.gpu.packing.small_runtime import Reachable

REACHABLE = Reachable.read()
PROVIDER = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"

if hashlib.sha256(PROVIDER.read_bytes()).hexdigest() != REACHABLE.provider_sha256:
    pytest.skip("the list is of the library for Python 3.12", allow_module_level=True)


def start_of_provider() -> int:
    """Where the library was loaded to."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return next(int(line.partition("-")[0], 16) for line in lines if line.endswith(PROVIDER.name))


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("name", ["tiny-fp16", "tiny-int8-bf16", "tiny-int8-fp16", "tiny-int4-fp16", "7b-int8-fp16"])
@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_launched_kernel_is_in_a_fat_binary_that_is_kept(
    name: str, rows: int, switch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KERNELS_SWITCH, switch)
    with counted() as found, opened(name, rows=rows, positions=2304) as backend:
        backend.prefill(rows - 1, np.arange(1, 2049), 0)
        backend.prefill(0, np.arange(1, 41), 0)
        backend.decode([5] * rows, [40] * rows)
        backend.verify(0, [1, 2, 3, 4], 41)
    launched = {match[1] for what in found if (match := re.match(r"(?:captured )?kernel (\S+)", what))}
    start = start_of_provider()
    places = {kernel: address - start for kernel, address in kernels().items()}
    assert len(launched) > 5
    assert not [kernel for kernel in launched if places[kernel] not in REACHABLE.offsets]
