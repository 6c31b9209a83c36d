"""PyTorch on the same card: eager with a growing cache, and with a static cache in one CUDA graph, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from starling.profiling.gpu.stages.kit import Kit
from starling.profiling.gpu.stages.random_bundles import random_model
from starling.profiling.gpu.stages.throughput import POSITIONS, timed_ms

_PROMPTS, _DRY_PROMPTS = (128, 2048), (32,)
_STATIC = ((1, 128), (4, 128), (16, 128), (1, 2048))  # rows, prompt
_DRY_STATIC = ((2, 32),)
_STEPS, _DRY_STEPS = 48, 4
_WARM = 8
_RUNS_BEFORE_CAPTURE = 3


def run(kit: Kit) -> None:
    """The 7B shape in fp16; its window is left out, since a plain static cache is PyTorch's fastest."""
    manifest = kit.manifest(kit.large("fp16"))
    dtype = torch.float16 if kit.machine.is_card else torch.float32
    model = random_model(manifest["source"]["name"], dtype, kit.machine.torch_device, window=False)
    with torch.inference_mode():
        for prompt in _PROMPTS if kit.machine.is_card else _DRY_PROMPTS:
            with kit.results.guarded(how="eager", prompt=prompt):
                _eager(kit, model, prompt)
        _static(kit, model, model, "static cache, CUDA graph")
        if not kit.machine.is_card:
            kit.results.write(how="compiled, CUDA graph", skipped="it compiles for a GPU")
            return
        begin = perf_counter()
        compiled = torch.compile(model, dynamic=False, options={"triton.cudagraphs": False})
        _static(kit, model, compiled, "compiled, CUDA graph")
        kit.results.write(how="compiled, CUDA graph", compile_and_run_s=round(perf_counter() - begin, 1))


def _static(kit: Kit, model: Any, forward: Callable[..., Any], how: str) -> None:
    for rows, prompt in _STATIC if kit.machine.is_card else _DRY_STATIC:
        with kit.results.guarded(how=how, rows=rows, prompt=prompt):
            _static_cache(kit, model, forward, how, rows, prompt)


def _eager(kit: Kit, model: Any, prompt: int) -> None:
    ids = _prompt(kit, 1, prompt)
    one = ids[:, :1]

    def likeliest(**inputs: Any) -> Any:
        return model(**inputs, logits_to_keep=1).logits[0, -1].argmax().item()

    ttft = timed_ms(lambda _: likeliest(input_ids=ids), 5 if kit.machine.is_card else 1, 2)
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    steps = _STEPS // 2 if kit.machine.is_card else _DRY_STEPS
    step = timed_ms(lambda _: likeliest(input_ids=one, past_key_values=cache, use_cache=True), steps, 4)
    _write(kit, "eager", 1, prompt, step, ttft_ms=round(ttft, 2))


def _static_cache(kit: Kit, model: Any, forward: Callable[..., Any], how: str, rows: int, prompt: int) -> None:
    from transformers import StaticCache

    device = kit.machine.torch_device
    cache = StaticCache(config=model.config, max_cache_len=POSITIONS if kit.machine.is_card else 2 * prompt)
    ids, position = _prompt(kit, rows, prompt), torch.tensor([prompt], device=device)
    token = torch.full((rows, 1), 5, device=device)
    everything = torch.arange(prompt, device=device)
    model(input_ids=ids, past_key_values=cache, cache_position=everything, logits_to_keep=1)

    def step() -> torch.Tensor:
        where = {"cache_position": position, "position_ids": position[None].expand(rows, 1)}
        chosen: torch.Tensor = forward(input_ids=token, past_key_values=cache, **where).logits[:, -1].argmax(-1)
        return chosen

    replay = _captured(step) if kit.machine.is_card else step

    def timed(_: int) -> None:
        position.add_(1)
        replay().tolist()

    steps = _STEPS if kit.machine.is_card else _DRY_STEPS
    _write(kit, how, rows, prompt, timed_ms(timed, steps, _WARM))


def _captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The step as one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_RUNS_BEFORE_CAPTURE):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return chosen

    return replay


def _prompt(kit: Kit, rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, 30000, (rows, length), device=kit.machine.torch_device)


def _write(kit: Kit, how: str, rows: int, prompt: int, step_ms: float, **more: Any) -> None:
    kit.results.write(
        how=how, rows=rows, prompt=prompt, step_ms=round(step_ms, 3), tok_s=round(rows * 1e3 / step_ms, 1), **more
    )
