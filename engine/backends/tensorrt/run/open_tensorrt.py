"""From a bundle to a TensorRT backend: library, GPU, engine."""

from __future__ import annotations

from starling.engine.backends.cuda.cuda_device import CudaDevice
from starling.engine.backends.tensorrt.run.select_engine import Wanted, check_dialect, runtime_of, select_engine
from starling.engine.backends.tensorrt.run.tensorrt_backend import TensorRTBackend
from starling.engine.backends.tensorrt.runtimes import load_library
from starling.engine.bundle.manifest import Bundle


def open_tensorrt(
    bundle: Bundle,
    runtime: str | None,
    *,
    engine: str | None = None,
    max_seq: int,
    max_batch: int,
    prefill_chunk: int | None = None,
    time_layers: bool = False,
) -> TensorRTBackend:
    """Open `bundle` with `runtime`, "tensorrt-rtx" or "tensorrt"; None: what built its engines, or is installed.

    `engine` names one of the bundle's engines; `time_layers` is as in TensorRTBackend. Raises BackendError without the
    library or a GPU, PlanError without a fitting engine.
    """
    check_dialect(bundle)
    library = load_library(runtime or runtime_of(bundle, engine))
    device = CudaDevice()
    record = select_engine(bundle, Wanted(library, device.target, max_seq, max_batch), engine)
    return TensorRTBackend(
        bundle,
        record,
        library,
        device,
        max_seq=max_seq,
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
        time_layers=time_layers,
    )
