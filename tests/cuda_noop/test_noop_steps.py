"""What a decode step, an opening and a closing ask of CUDA, for each kind of bundle, with our kernels and without."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noop_cuda import BUNDLES, counted, device_bytes, opened

from starling.engine.backends.backend import GREEDY, DeviceChoice
from starling.engine.backends.onnxruntime.cpu_session import import_onnxruntime
from starling.engine.backends.onnxruntime.cuda_session import KERNELS_SWITCH, SAMPLING_SWITCH
from starling.engine.backends.onnxruntime.onnxruntime_cuda import open_cuda
from starling.engine.bundle.manifest import Bundle

PROMPT = np.arange(1, 33)
#: Name, rows, our kernels.
CASES = [
    ("tiny-fp16", 1, "0"),
    ("tiny-fp16", 4, "0"),
    ("tiny-int8-bf16", 4, "0"),
    ("tiny-int8-fp16", 1, "0"),
    ("tiny-int8-fp16", 4, "1"),
    ("tiny-int4-fp16", 1, "0"),
]
MB = 1_000_000
DRAWN = DeviceChoice(temperature=0.8, top_k=0, top_p=0.9, seed=1)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}{'-own' if case[2] == '1' else ''}")
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int]:
    name, rows, switch = request.param
    monkeypatch.setenv(KERNELS_SWITCH, switch)
    return name, rows


def kernels(found: Counter[str]) -> int:
    """Kernels and products that were launched one by one."""
    return sum(times for what, times in found.items() if what.startswith(("kernel", "own kernel", "cuBLAS")))


def step_of(backend: Any, rows: int, choice: DeviceChoice = GREEDY) -> Counter[str]:
    """What a step asks whose token the next one finds on the device, with one launched before it."""
    backend.choose(0, choice, len(PROMPT) - 1)
    for row in range(rows):
        backend.prefill(row, PROMPT, 0)
    backend.decode([5] * rows, [len(PROMPT)] * rows)
    backend.launch(rows)
    with counted() as step:
        backend.launch(rows)
        backend.tokens()
    backend.tokens()
    return step


def one_launch_one_copy_one_wait(rows: int) -> dict[str, int]:
    """Of 8 bytes a row; CUDA counts an event as the end of the work that is waited for."""
    return {"graph launch": 1, f"copy device to pinned, {8 * rows} bytes": 1, "event": 1, "wait for an event": 1}


def test_a_step_is_one_launch_one_copy_of_8_bytes_a_row_and_one_wait(case: tuple[str, int]) -> None:
    name, rows = case
    with opened(name, rows=rows) as backend:
        assert backend.note is None
        assert backend.kernels_note is None
        assert step_of(backend, rows) == one_launch_one_copy_one_wait(rows)


def test_a_step_that_draws_asks_for_no_more(case: tuple[str, int]) -> None:
    name, rows = case
    with counted() as opening, opened(name, rows=rows) as backend:
        assert backend.can_choose(DRAWN)
        assert step_of(backend, rows, DRAWN) == one_launch_one_copy_one_wait(rows)
        with counted() as chosen:
            backend.choose(0, GREEDY, 0)
        assert not [what for what in chosen if "kernel" in what]
        assert step_of(backend, rows) == one_launch_one_copy_one_wait(rows)
        del backend
    assert opening["captured own kernel sample"] == rows, "once for each row count, when it is opened"
    assert opening["own kernel sample"] == 1, "after the prompt"
    assert not [what for what in opening if "illegal" in what]
    assert device_bytes() == 0


def test_a_card_whose_draws_are_wrong_leaves_them_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for switch, note in ((None, "the host draws tokens: the kernel that draws tokens chose [0, 0"), ("0", None)):
        monkeypatch.setenv(SAMPLING_SWITCH, switch or "")
        with opened("tiny-fp16") as backend:
            assert backend.can_choose(GREEDY)
            assert not backend.can_choose(DRAWN)
            assert (backend.kernels_note or "").startswith(note or "")
            assert bool(backend.kernels_note) == bool(note)


@pytest.mark.parametrize(
    ("name", "rows", "switch", "own_kernels", "most"),
    [
        # Measured: 0.10 GB above the weights and the cache; for int8 less, since its zero points stay on the host.
        ("7b-fp16", 1, "0", 0, 110 * MB),
        ("7b-int8-fp16", 4, "0", 0, 0),
        ("7b-int8-fp16", 1, "1", 4 * 32 + 1, 0),
    ],
)
def test_a_step_of_the_7b_shape_and_its_memory(
    name: str, rows: int, switch: str, own_kernels: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KERNELS_SWITCH, switch)
    weights = Bundle.open(BUNDLES / name).weights.bytes
    with counted() as opening, opened(name, rows=rows) as backend:
        assert device_bytes() - weights - backend.kv_cache_bytes <= most
        assert backend.captured_rows == list(range(1, rows + 1))
        assert step_of(backend, rows) == one_launch_one_copy_one_wait(rows)
        assert step_of(backend, rows, DRAWN) == one_launch_one_copy_one_wait(rows)
        del backend
    assert device_bytes() == 0
    assert not [what for what in opening if "illegal" in what]
    # For the step that takes the likeliest token, and for the one that draws.
    assert opening["captured own kernel linear"] == 2 * own_kernels * rows
    if own_kernels:
        assert not [what for what in opening if what.startswith("captured cuBLAS")]


def test_a_step_that_the_host_feeds_has_two_copies_more_and_no_kernel(case: tuple[str, int]) -> None:
    name, rows = case
    with opened(name, rows=rows) as backend:
        for row in range(rows):
            backend.prefill(row, PROMPT, 0)
        with counted() as step:
            backend.decode([5] * rows, [len(PROMPT)] * rows).tokens()
        assert kernels(step) == 0
        assert step["graph launch"] == 1
        assert sum(times for what, times in step.items() if "copy" in what) == 3
        assert sum(times for what, times in step.items() if "wait" in what) == 1


@pytest.mark.parametrize(
    ("tokens", "products"),
    [
        # The kernels run in slices of 16 tokens; lm_head's has the last token alone.
        (40, {}),
        # Blocks of 32 MB of dequantized weights, all of one product's alike.
        (300, {"3072 by 300 over 4096": 2, "4096 by 300 over 4096": 1 + 7, "1024 by 300 over 14336": 4}),
    ],
)
def test_a_prompt_of_int8_is_multiplied_in_slices_or_by_dequantized_blocks_of_one_size(
    tokens: int, products: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KERNELS_SWITCH, "1")
    layers = 32
    with opened("7b-int8-fp16") as backend, counted() as prefill:
        backend.prefill(0, np.arange(1, tokens + 1), 0)
    name = "cuBLAS cublasGemmEx "
    found = {what.removeprefix(name): times for what, times in prefill.items() if what.startswith(name)}
    assert found == {what: times * layers for what, times in products.items()}
    assert prefill["own kernel dequantize"] == sum(found.values())
    assert prefill["own kernel linear"] == 1 + (0 if products else 3 * 4 * layers)


def test_a_prompt_is_waited_for_once(case: tuple[str, int]) -> None:
    name, rows = case
    with opened(name, rows=rows) as backend, counted() as prefill:
        backend.prefill(rows - 1, np.arange(1, 300), 0).tokens()
    assert prefill["wait for an event"] + prefill["wait for a stream"] <= 2
    assert not [what for what in prefill if what.startswith(("waiting copy", "cudaMalloc"))]


def test_a_row_count_is_captured_once_at_opening_and_nothing_illegal_is_asked_meanwhile(case: tuple[str, int]) -> None:
    name, rows = case
    with counted() as opening, opened(name, rows=rows) as backend:
        assert backend.captured_rows == list(range(1, rows + 1))
        backend.prefill(0, PROMPT, 0)
        backend.decode([5], [len(PROMPT)])
        backend.verify(0, [1, 2, 3, 4], len(PROMPT) + 1)
    assert opening["capture"] == 2 * rows  # with the kernel that draws, and without
    assert not [what for what in opening if "illegal" in what]


def test_closing_gives_all_memory_back(case: tuple[str, int]) -> None:
    name, rows = case
    with opened(name, rows=rows) as backend:
        backend.prefill(0, PROMPT, 0)
        assert device_bytes() > 0
        del backend
    assert device_bytes() == 0


@pytest.mark.parametrize(
    ("name", "switch", "most"),
    [
        # Measured 20.7, 20.5 and 58 MB: logits, buffers of a chunk, the arena; 32 MB for weights that are dequantized.
        ("tiny-fp16", "0", 22 * MB),
        ("tiny-int8-fp16", "0", 22 * MB),
        ("tiny-int8-fp16", "1", 60 * MB),
    ],
)
def test_an_opening_takes_little_more_than_weights_and_cache(
    name: str, switch: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KERNELS_SWITCH, switch)
    weights = Bundle.open(BUNDLES / name).weights.bytes
    with opened(name) as backend:
        assert device_bytes() - weights - backend.kv_cache_bytes <= most


@pytest.fixture
def profiled(case: tuple[str, int], tmp_path: Path) -> list[dict[str, Any]]:
    """The nodes that a prefill and a decode step ran, by ONNX Runtime's own profile."""
    name, rows = case
    ort = import_onnxruntime()
    backend = open_cuda(
        ort,
        Bundle.open(BUNDLES / name),
        max_seq=256,
        max_batch=rows,
        prefill_chunk=None,
        profile_prefix=tmp_path / "profile",
    )
    try:
        backend.prefill(0, PROMPT, 0)
        backend.decode([5] * rows, [len(PROMPT)] * rows)
        events = json.loads(backend.end_profiling().read_text(encoding="utf-8"))
    finally:
        backend.close()
    return [event["args"] for event in events if event.get("cat") == "Node" and "provider" in event["args"]]


def test_every_node_is_on_the_gpu_and_nothing_is_copied_between(profiled: list[dict[str, Any]]) -> None:
    assert len(profiled) > 20
    assert {node["provider"] for node in profiled} == {"CUDAExecutionProvider"}
    assert not [node["op_name"] for node in profiled if "Memcpy" in node["op_name"]]
