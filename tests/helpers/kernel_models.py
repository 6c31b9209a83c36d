"""Models of one node for the tests of the CPU kernels."""

import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from starling.engine.kernels import require_kernel_library

Arrays = Mapping[str, NDArray[Any]]

_IS_ARM = platform.machine() == "aarch64"
#: The best that this processor can do, and what others would take by `STARLING_CPU_ISA`; fewer for products of 16-bit
#: weights.
INSTRUCTION_SETS = ["best", "neon"] if _IS_ARM else ["best", "avx-vnni", "avx512", "avx2"]
HALF_INSTRUCTION_SETS = ["best"] if _IS_ARM else ["best", "avx512", "avx2"]


def session(
    operator: str,
    domain: str,
    inputs: list[str],
    outputs: list[str],
    *,
    fed: Arrays,
    weights: Arrays,
    threads: int = 2,
    output_types: Mapping[str, int] | None = None,
    **attributes: Any,
) -> ort.InferenceSession:
    """A session of one node; `fed` shows the types and ranks of what is fed, `inputs` may leave names empty.

    Outputs are float32 but for `output_types`.
    """
    node = helper.make_node(operator, inputs, outputs, domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), [None] * x.ndim)
            for name, x in fed.items()
        ],
        [
            helper.make_tensor_value_info(name, (output_types or {}).get(name, TensorProto.FLOAT), None)
            for name in outputs
        ],
        [numpy_helper.from_array(np.ascontiguousarray(x), name) for name, x in weights.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.register_custom_ops_library(str(require_kernel_library().path))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_in_place(running: ort.InferenceSession, fed: Arrays, cache: Arrays) -> NDArray[np.float32]:
    """The first output; `cache` has the arrays of past_key and past_value, which are written to as present."""
    binding = running.io_binding()
    for name, array in {**fed, **cache}.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        binding.bind_input(name, "cpu", 0, kind, array.shape, array.ctypes.data)
    first, *present = (output.name for output in running.get_outputs())
    binding.bind_output(first)
    for name, array in zip(present, cache.values(), strict=True):
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        binding.bind_output(name, "cpu", 0, kind, array.shape, array.ctypes.data)
    running.run_with_iobinding(binding)
    return np.asarray(binding.get_outputs()[0].numpy())
