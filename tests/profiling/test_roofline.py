"""The roof that prefill and decode are held against: operations and bytes from the architecture, peaks measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from starling.engine.backends.onnxruntime.cpu_session import import_onnxruntime
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError
from starling.profiling.machine.arithmetic import measure_product, product_graph
from starling.profiling.machine.roofline import Work, decode_work, live_kv_bytes, prefill_work, under_roof


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


def test_decode_counts_two_operations_for_every_weight_of_a_product(bundle: Bundle) -> None:
    shape = bundle.architecture
    table = shape.vocab_size * shape.hidden_size
    weights = shape.parameters - (1 if shape.tied_embeddings else 2) * table + table
    attention = 4 * shape.layers * shape.query_heads * shape.head_dim
    assert decode_work(bundle, 100, 2, 1).operations == 2 * weights + attention * 101
    assert decode_work(bundle, 100, 2, 3).operations == 3 * decode_work(bundle, 100, 2, 1).operations


def test_lm_head_runs_once_in_a_prefill_and_each_chunk_reads_the_weights(bundle: Bundle) -> None:
    one, two = prefill_work(bundle, 64, 64), prefill_work(bundle, 64, 32)
    assert one.operations == two.operations
    cache = bundle.kv_cache.bytes_per_token
    assert one.bytes == bundle.weights.bytes_per_token + (64 + 64) * cache
    assert two.bytes == 2 * bundle.weights.bytes_per_token + (64 + 32 + 64) * cache
    longer = prefill_work(bundle, 65, 65).operations - one.operations
    assert longer < decode_work(bundle, 64, 2, 1).operations


def test_a_sliding_window_bounds_what_is_attended_to(bundle: Bundle) -> None:
    assert bundle.architecture.sliding_window == 4096
    assert live_kv_bytes(bundle, 5000, 100) == 4096 * bundle.kv_cache.bytes_per_token
    assert live_kv_bytes(bundle, 4094, 4) == round((4095 + 4096 + 4096) / 3 * bundle.kv_cache.bytes_per_token)
    unbounded = replace(bundle, architecture=replace(bundle.architecture, sliding_window=None))
    assert live_kv_bytes(unbounded, 5000, 3) == round(5001.5 * bundle.kv_cache.bytes_per_token)


def test_the_slower_limit_is_the_roof() -> None:
    machine = {"operations_per_second": 100.0, "bytes_per_second": 10.0}
    memory = under_roof(Work(operations=50, bytes=20), 4.0, **machine)
    assert (memory.bound, memory.share) == ("memory", 0.5)
    arithmetic = under_roof(Work(operations=500, bytes=20), 10.0, **machine)
    assert (arithmetic.bound, arithmetic.share) == ("arithmetic", 0.5)


@pytest.mark.parametrize(
    ("operator", "inputs", "weights", "outputs"),
    [("MatMul", "float32", "float32", "float32"), ("MatMulInteger", "uint8", "int8", "int32")],
)
def test_the_measured_product_is_a_product(operator: str, inputs: str, weights: str, outputs: str) -> None:
    random = np.random.default_rng(1)
    x, w = random.integers(0, 9, (3, 5)).astype(inputs), random.integers(0, 9, (5, 4)).astype(weights)
    session = import_onnxruntime().InferenceSession(product_graph(operator, 3, w, inputs, outputs))
    [y] = session.run(None, {"x": x})
    assert y.dtype == outputs
    np.testing.assert_array_equal(y, x.astype(np.int64) @ w.astype(np.int64))


def test_the_arithmetic_peak_is_a_physical_figure() -> None:
    rate = measure_product("MatMul", "float32", "float32", "float32", threads=1, passes=2, width=512)
    assert 1e8 < rate < 1e14
    with pytest.raises(UserError, match="passes is 0"):
        measure_product("MatMul", "float32", "float32", "float32", threads=1, passes=0)
