"""The machine's arithmetic peak: what its own matrix product reaches, the roof that a prefill is held against."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starling.engine.backends.onnxruntime.cpu_session import import_onnxruntime
from starling.engine.backends.onnxruntime.step_buffers import ONNX_TYPES
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError
from starling.engine.onnx_bytes import GRAPH, INPUT, NAME, NODE, OPERATOR, OUTPUT, field

#: Large enough for the kernel's own peak (its weights do not fit into a core's caches), small enough for 0.1 s a pass.
ROWS, WIDTH = 512, 2048
#: On a GPU: 1.1 tera-operations a pass, beside which its launch is nothing.
CUDA_WIDTH, CUDA_PASSES = 8192, 10
#: Versions that every ONNX Runtime here reads.
_IR_VERSION, _OPSET = 8, 17


@dataclass(frozen=True, slots=True)
class ArithmeticPeak:
    """The fastest of the products that could serve the bundle, in operations (multiply and add are two) per second."""

    operations_per_second: float
    #: Which product it was.
    how: str
    #: Every product that was measured, by its description.
    measured: dict[str, float]


def measure_arithmetic_peak(bundle: Bundle, threads: int) -> ArithmeticPeak:
    """Time ONNX Runtime's own CPU products in the types that the bundle may compute in.

    Float32 always: the CPU kernels of fp16 bundles and of block-quantized weights may convert to it. A quantized
    bundle may multiply int8 activations, hence uint8 x int8 (MatMulInteger) too.
    """
    kinds = {"float32 MatMul": ("MatMul", "float32", "float32", "float32")}
    if bundle.quantization is not None:
        kinds["uint8 x int8 MatMulInteger"] = ("MatMulInteger", "uint8", "int8", "int32")
    measured = {name: measure_product(*kind, threads=threads) for name, kind in kinds.items()}
    best = max(measured, key=lambda name: measured[name])
    how = f"ONNX Runtime {best}, [{ROWS}, {WIDTH}] x [{WIDTH}, {WIDTH}], {threads} threads, best pass"
    return ArithmeticPeak(measured[best], how, measured)


def measure_product(
    operator: str, inputs: str, weights: str, outputs: str, *, threads: int, passes: int = 12, width: int = WIDTH
) -> float:
    """Operations per second of one product [ROWS, width] x [width, width] on the CPU, the best of `passes`.

    Raises UserError for fewer than one pass or thread.
    """
    if passes < 1 or threads < 1:
        raise UserError(f"passes is {passes} and threads is {threads}: give both as 1 or more")
    model = product_graph(operator, ROWS, _values(weights, (width, width)), inputs, outputs)
    session, feed = _session(model, threads), {"x": _values(inputs, (ROWS, width))}
    session.run(None, feed)  # warm-up: the first run allocates the output
    best = min(_timed(session, feed) for _ in range(passes))
    return 2 * ROWS * width * width / best


def measure_cuda_peak(ort: Any) -> ArithmeticPeak:
    """Time ONNX Runtime's float16 product on the first GPU, which computes so whatever the weights are stored as."""
    name, width = "float16 MatMul", CUDA_WIDTH
    options = ort.SessionOptions()
    options.log_severity_level = 3
    model = product_graph("MatMul", width, _values("float16", (width, width)), "float16", "float16")
    session = ort.InferenceSession(model, options, providers=["CUDAExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(_values("float16", (width, width)), "cuda", 0))
    half = ONNX_TYPES["float16"]
    product = ort.OrtValue.ortvalue_from_shape_and_type([width, width], half, "cuda", 0)
    binding.bind_ortvalue_output("y", product)
    best = float("inf")
    for _ in range(CUDA_PASSES):
        begin = perf_counter()
        session.run_with_iobinding(binding)
        best = min(best, perf_counter() - begin)
    rate = 2 * width**3 / best
    how = f"ONNX Runtime {name}, [{width}, {width}] x [{width}, {width}], best of {CUDA_PASSES} passes"
    return ArithmeticPeak(rate, how, {name: rate})


def product_graph(operator: str, rows: int, weights: NDArray[np.generic], input_type: str, output_type: str) -> bytes:
    """An ONNX model of one product, as bytes: `y` [rows, n] = `operator`(`x` [rows, k], weights [k, n])."""
    tensor = (
        b"".join(field(1, size) for size in weights.shape)
        + field(2, ONNX_TYPES[weights.dtype.name])
        + field(8, "w")
        + field(9, weights.tobytes())
    )
    node = (
        field(INPUT, "x") + field(INPUT, "w") + field(OUTPUT, "y") + field(NAME, "product") + field(OPERATOR, operator)
    )
    graph = (
        field(NODE, node)
        + field(2, "graph")
        + field(5, tensor)
        + field(11, _value("x", input_type, (rows, weights.shape[0])))
        + field(12, _value("y", output_type, (rows, weights.shape[1])))
    )
    return field(1, _IR_VERSION) + field(GRAPH, graph) + field(8, field(1, "") + field(2, _OPSET))


def _value(name: str, kind: str, shape: tuple[int, ...]) -> bytes:
    dimensions = b"".join(field(1, field(1, size)) for size in shape)
    tensor = field(1, ONNX_TYPES[kind]) + field(2, dimensions)
    return field(1, name) + field(2, field(1, tensor))


def _timed(session: Any, feed: dict[str, NDArray[np.generic]]) -> float:
    begin = perf_counter()
    session.run(None, feed)
    return perf_counter() - begin


def _session(model: bytes, threads: int) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _values(kind: str, shape: tuple[int, int]) -> NDArray[np.generic]:
    # Small numbers of many values: denormals and zeros would be another speed on some processors.
    numbers = np.random.default_rng(0).integers(0, 64, shape)
    return (numbers / 64).astype(kind) if kind.startswith("float") else numbers.astype(kind)
