"""Right first: logits against PyTorch's in fp32 on the same weights, and every way of decoding against the others."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from starling.engine.bundle.manifest import Bundle
from starling.profiling.gpu.stages.kit import Kit
from starling.profiling.gpu.stages.random_bundles import fill_bundle, random_model

_MODEL, _START = "starling-tiny", "tiny-"
_FORCED_STEPS, _GREEDY_STEPS = 6, 40
#: The mean KL up to which a bundle of random weights is right: rounding alone gives a third of it and less.
MOST_KL = {None: 3e-6, "int8": 1e-3, "int4": 0.2}
_FIRST_TOKEN, _LAST_TOKENS = 3, 3  # what is no token of a text is not drawn
_ROWS_COMPARED, _POSITIONS_COMPARED, _CHUNK_COMPARED = 3, 512, 64
_VERIFIED = slice(5, 13)  # of the first row's tokens


@dataclass(frozen=True, slots=True)
class Case:
    """So many rows with a prompt of so many tokens, prefilled in pieces of `chunk` (None: the backend's own)."""

    rows: int
    prompt: int
    chunk: int | None = None


#: The fourth prompt is longer than the sliding window of 4,096.
CASES = (Case(1, 40), Case(4, 300, 128), Case(16, 40), Case(1, 4500, 1024), Case(1, 2048))
KERNEL_CASES = (Case(1, 40), Case(4, 300, 128), Case(8, 20), Case(16, 40), Case(1, 2048))
DRY_CASES = (Case(1, 40), Case(4, 60, 32))


def run(kit: Kit) -> None:
    """Every small bundle; where it has a graph for our CUDA kernels, with them too."""
    cases = CASES if kit.machine.is_card else DRY_CASES
    model = random_model(_MODEL, torch.float32, kit.machine.torch_device)
    for name in kit.names(_START):
        with kit.results.guarded(bundle=name):
            bundle = fill_bundle(kit, name, model)
            if (reason := kit.machine.why_not(bundle)) is not None:
                kit.results.write(bundle=name, skipped=reason)
                continue
            check(kit, bundle, model, cases, kernels=False)
            if kit.machine.is_card and bundle.cuda_kernels is not None:
                check(kit, bundle, model, KERNEL_CASES, kernels=True)


def check(kit: Kit, bundle: Bundle, model: Any, cases: Iterable[Case], *, kernels: bool) -> None:
    """Compare with `model` in every case, then the ways of decoding with each other."""
    for case in cases:
        with kit.results.guarded(bundle=bundle.folder.name, rows=case.rows, prompt=case.prompt):
            compare(kit, bundle, model, case, kernels=kernels)
    with kit.results.guarded(bundle=bundle.folder.name, what="ways of decoding"):
        compare_ways(kit, bundle, kernels=kernels)


def compare(kit: Kit, bundle: Bundle, model: Any, case: Case, *, kernels: bool) -> None:
    """Logits of a prefill and of forced decode steps, in a cache that was full of NaN before."""
    vocabulary = bundle.architecture.vocab_size
    shape = (case.rows, case.prompt + _FORCED_STEPS)
    ids = np.random.default_rng(3).integers(_FIRST_TOKEN, vocabulary - _LAST_TOKENS, shape)
    wanted = _reference(model, ids, case.prompt, kit.machine.torch_device)
    positions = case.prompt + _FORCED_STEPS + 64
    backend = kit.machine.open(bundle, rows=case.rows, positions=positions, chunk=case.chunk, kernels=kernels)
    try:
        kit.machine.fill_cache_with_nan(backend, case.rows)
        got, agreeing = _logits(backend, ids, case.prompt)
        figures = divergence(wanted, got)
        scheme = None if bundle.quantization is None else bundle.quantization.scheme
        right = figures["finite"] and figures["kl_mean"] < MOST_KL[scheme] and agreeing == 1.0
        kit.results.write(
            bundle=bundle.folder.name,
            rows=case.rows,
            prompt=case.prompt,
            chunk=case.chunk,
            **how(backend),
            **figures,
            choice_agrees=agreeing,
            ok=right,
        )
    finally:
        backend.close()
        del backend
        gc.collect()


def how(backend: Any) -> dict[str, Any]:
    """What ran: whether steps are CUDA graphs, whose kernels, and the backend's notes."""
    notes = [note for note in (backend.note, getattr(backend, "kernels_note", None)) if note]
    captured = bool(getattr(backend, "captured_rows", []))
    return {"captured": captured, "kernels": backend.kernels, "note": "; ".join(notes) or None}


def divergence(wanted: torch.Tensor, got: torch.Tensor) -> dict[str, Any]:
    """Mean and largest KL in nats, top-1 agreement, and the relative error of logits [..., vocabulary]."""
    log_p, log_q = (torch.log_softmax(logits.double(), -1) for logits in (wanted, got))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {
        "finite": bool(torch.isfinite(got).all()),
        "kl_mean": float(kl.mean()),
        "kl_max": float(kl.max()),
        "top1": float((wanted.argmax(-1) == got.argmax(-1)).float().mean()),
        "relative_error": float((got - wanted).norm() / wanted.norm()),
    }


def _reference(model: Any, ids: Any, prompt: int, device: str) -> torch.Tensor:
    """PyTorch's logits from the prompt's last token on, [rows, 1 + steps, vocabulary]."""
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor(row[None], device=device)).logits[0, prompt - 1 :] for row in ids]
        return torch.stack([row.float().cpu() for row in rows])


def _logits(backend: Any, ids: Any, prompt: int) -> tuple[torch.Tensor, float]:
    """The backend's, and in how many decode steps its choice was the likeliest token."""
    rows, length = ids.shape
    steps = []
    first = [backend.prefill(row, ids[row, :prompt].astype(np.int64), 0).logits()[0].copy() for row in range(rows)]
    steps.append(np.stack(first))
    agreeing = 0
    for position in range(prompt, length):
        output = backend.decode([int(token) for token in ids[:, position]], [position] * rows)
        logits = np.array(output.logits()[:rows])
        steps.append(logits)
        agreeing += sum(int(a) == int(b) for a, b in zip(output.tokens(), logits.argmax(-1), strict=True))
    logits_of_rows = np.stack(steps, axis=1).astype(np.float32)
    return torch.from_numpy(logits_of_rows), agreeing / (rows * (length - prompt))


def compare_ways(kit: Kit, bundle: Bundle, *, kernels: bool) -> None:
    """Greedy tokens of steps launched before the last is read, of steps fed by the host, and without CUDA graphs."""
    ways = {"launched": True, "fed": True, "not captured": False}
    if not kit.machine.is_card:
        ways = {"fed": True}
    tokens: dict[str, list[list[int]]] = {}
    verified = True
    for way, capture in ways.items():
        backend = kit.machine.open(
            bundle,
            rows=_ROWS_COMPARED,
            positions=_POSITIONS_COMPARED,
            chunk=_CHUNK_COMPARED,
            capture=capture,
            kernels=kernels,
        )
        try:
            tokens[way] = _greedy(backend, launched=way == "launched")
            verified &= _is_verified(backend, [step[0] for step in tokens[way]])
            kit.results.write(bundle=bundle.folder.name, way=way, **how(backend))
        finally:
            backend.close()
            del backend
            gc.collect()
    same = all(each == next(iter(tokens.values())) for each in tokens.values())
    different = len({token for step in next(iter(tokens.values())) for token in step})
    kit.results.write(
        bundle=bundle.folder.name,
        ways=list(ways),
        kernels=kernels,
        steps=_GREEDY_STEPS,
        different_tokens=different,
        same_tokens=same,
        verified=verified,
        ok=same and verified,
    )


def _prompt_length(row: int) -> int:
    return 20 + 30 * row


def _greedy(backend: Any, *, launched: bool) -> list[list[int]]:
    """The tokens of every row, a step at a time, from the one after its prompt on."""
    random = np.random.default_rng(5)
    prompts = [random.integers(_FIRST_TOKEN, 30000, _prompt_length(row)) for row in range(_ROWS_COMPARED)]
    steps = [[backend.prefill(row, prompt, 0).tokens()[0] for row, prompt in enumerate(prompts)]]
    if launched:
        backend.launch(_ROWS_COMPARED)
        for _ in range(_GREEDY_STEPS - 1):
            backend.launch(_ROWS_COMPARED)
            steps.append(backend.tokens())
        return [*steps, backend.tokens()]
    for step in range(_GREEDY_STEPS):
        positions = [_prompt_length(row) + step for row in range(_ROWS_COMPARED)]
        steps.append(list(backend.decode(steps[-1], positions).tokens()))
    return steps


def _is_verified(backend: Any, tokens: list[int]) -> bool:
    """Whether several tokens in one step choose what one step each has chosen."""
    draft, start = tokens[_VERIFIED], _prompt_length(0) + (_VERIFIED.start or 0)
    chosen = backend.verify(0, draft, start).tokens()
    return list(chosen) == tokens[_VERIFIED.start + 1 : _VERIFIED.stop + 1]
