"""Attention by the CUDA kernel, and a whole decode step of them: every product and attention of all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from starling.engine.kernels.cuda.variants import Attention, AttentionArguments, Linear
from starling.profiling.gpu.card import Source, Target
from starling.profiling.gpu.kernel_products import (
    MOST_NORMALIZED_ROWS,
    Model,
    Pool,
    dequantized,
    expected,
    launcher,
    norm_launcher,
    relative_error,
)

HEAD = 128
SCALE = HEAD**-0.5
_WARPS_AND_SPLITS = [(4, 32), (4, 64), (8, 16), (8, 32), (4, 16), (2, 64), (4, 8), (8, 8), (4, 1)]


def attention_candidates(model: Model) -> list[Attention]:
    group = model.heads // model.kv_heads
    return [Attention(group, warps, True, splits) for warps, splits in _WARPS_AND_SPLITS]


@dataclass(slots=True)
class AttentionState:
    """What attention of one layer reads and writes."""

    qkv: Any  # [rows, (heads + 2 kv_heads) * 128]
    keys: Any  # [rows, kv_heads, positions, 128]
    values: Any
    cosines: Any
    sines: Any
    lengths: Any
    out: Any

    @classmethod
    def random(cls, model: Model, lengths: list[int], device: str, *, poison: bool) -> AttentionState:
        """`poison`: the cache is NaN from each row's end on."""
        rows = len(lengths)
        keys, values = (
            torch.randn(rows, model.kv_heads, model.positions, HEAD, device=device).half() for _ in range(2)
        )
        if poison:
            for row, length in enumerate(lengths):
                keys[row, :, length:] = values[row, :, length:] = float("nan")
        cosines, sines = rotary_tables(model.positions, device)
        return cls(
            torch.randn(rows, (model.heads + 2 * model.kv_heads) * HEAD, device=device).half(), keys, values,
            cosines, sines, torch.tensor(lengths, dtype=torch.int32, device=device),
            torch.full((rows, model.heads * HEAD), float("nan"), dtype=torch.float16, device=device),
        )  # fmt: skip


@dataclass(slots=True)
class Scratch:
    """Of attention kernels; they leave the counters zero."""

    parts: Any
    counters: Any

    @classmethod
    def of(cls, variant: Attention, model: Model, rows: int, device: str) -> Scratch:
        parts = torch.full((variant.parts(rows, model.kv_heads),), float("nan"), device=device)
        return cls(parts, torch.zeros(rows * model.kv_heads, dtype=torch.int32, device=device))


def rotary_tables(positions: int, device: str) -> tuple[Any, Any]:
    frequencies = 10000.0 ** (-torch.arange(0, HEAD, 2, device=device).double() / HEAD)
    angles = torch.arange(positions, device=device).double()[:, None] * frequencies
    return angles.cos().half(), angles.sin().half()


def attention_launcher(
    target: Target,
    variant: Attention,
    model: Model,
    state: AttentionState,
    scratch: Scratch,
    *,
    window: int,
    early: bool,
) -> Callable[[], None]:
    arguments = AttentionArguments(
        state.out.data_ptr(), state.qkv.data_ptr(), state.keys.data_ptr(), state.values.data_ptr(),
        state.cosines.data_ptr(), state.sines.data_ptr(), state.lengths.data_ptr(), scratch.parts.data_ptr(),
        scratch.counters.data_ptr(), state.keys.shape[2], window, SCALE,
    )  # fmt: skip
    grid = (variant.splits, model.kv_heads, state.qkv.shape[0])
    source = Source.of(variant)
    return lambda: target.launch(source, grid, arguments, early=early)


def rotated(x: Any, cosine: Any, sine: Any) -> Any:
    """[heads, 128] at one position, as fp16 goes on."""
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], -1).half()


def expected_attention(model: Model, state: AttentionState, window: int) -> tuple[Any, Any, Any]:
    """(out, keys, values) in double precision, the caches with the new position, as reference.py has it."""
    keys, values = state.keys.clone(), state.values.clone()
    outs = []
    for row, past in enumerate(state.lengths.tolist()):
        cosine, sine = state.cosines[past].float(), state.sines[past].float()
        each = state.qkv[row].view(-1, HEAD)
        q = rotated(each[: model.heads], cosine, sine).double()
        keys[row, :, past] = rotated(each[model.heads : model.heads + model.kv_heads], cosine, sine)
        values[row, :, past] = each[model.heads + model.kv_heads :]
        begin = max(0, past + 1 - window) if window else 0
        q = q.view(model.kv_heads, -1, HEAD)
        scores = q @ keys[row, :, begin : past + 1].double().transpose(1, 2) * SCALE
        outs.append((scores.softmax(-1) @ values[row, :, begin : past + 1].double()).reshape(-1))
    return torch.stack(outs), keys, values


def check_attention(
    target: Target, variant: Attention, model: Model, lengths: list[int], window: int
) -> tuple[float, float]:
    """Relative errors of the output, and the largest difference in the caches (rounding; inf where one is wrong)."""
    state = AttentionState.random(model, lengths, target.device, poison=True)
    scratch = Scratch.of(variant, model, len(lengths), target.device)
    wanted, keys, values = expected_attention(model, state, window)
    run = attention_launcher(target, variant, model, state, scratch, window=window, early=True)
    for _ in range(3):  # the counters must be as they were
        state.out.fill_(float("nan"))
        run()
        target.synchronize()
    same = torch.equal(state.keys.isnan(), keys.isnan()) and torch.equal(state.values.isnan(), values.isnan())
    difference = max(
        float((ours.float() - theirs.float()).nan_to_num().abs().max())
        for ours, theirs in ((state.keys, keys), (state.values, values))
    )
    return relative_error(state.out, wanted), difference if same else float("inf")


def time_attention(target: Target, variant: Attention, model: Model, rows: int, length: int) -> float:
    """µs, each reading another layer's cache."""
    layers = model.layers if target.is_card else 1
    states = [AttentionState.random(model, [length] * rows, target.device, poison=False) for _ in range(layers)]
    scratch = Scratch.of(variant, model, rows, target.device)
    runs = [
        attention_launcher(target, variant, model, state, scratch, window=0, early=True) for state in states
    ]  # fmt: skip

    def work() -> None:
        for run in runs:
            run()

    return target.time_us(work, 9) / len(runs)


@dataclass(frozen=True, slots=True)
class Choice:
    """A variant, and how it is launched."""

    variant: Linear
    persistent: int = 0
    early: bool = True


@dataclass(slots=True)
class Step:
    """One decode step of a model with random weights. `choices`: by the product's name."""

    target: Target
    model: Model
    choices: dict[str, Choice]
    attention: Attention
    pool: Pool
    rows: int
    length: int
    early: bool = True
    layers: int = 0  # 0: all of the model's
    hidden: Any = None
    logits: Any = None
    states: list[AttentionState] | None = None
    _kept: list[Any] | None = None

    def bytes(self, bits: int) -> int:
        """Read by a step: weights, scales, keys and values."""
        *layer, head = self.model.products()
        cache = 2 * self.rows * self.model.kv_heads * (self.length + 1) * HEAD * 2
        count = self.layers or self.model.layers
        return count * (sum(product.bytes(bits) for product in layer) + cache) + head.bytes(bits)

    def launches(self) -> list[Callable[[], None]]:
        device, rows, model = self.target.device, self.rows, self.model
        *layer, head = model.products()
        self.hidden = torch.randn(rows, model.hidden, device=device).half()
        self.logits = torch.full((rows, head.width), float("nan"), dtype=torch.float16, device=device)
        norm = torch.ones(model.hidden, dtype=torch.float16, device=device)
        normed = torch.empty_like(self.hidden)
        gated = torch.empty(rows, model.intermediate, dtype=torch.float16, device=device)
        scratch = Scratch.of(self.attention, model, rows, device)
        self.states, self._kept = [], [norm, normed, gated, scratch]
        base = AttentionState.random(model, [self.length] * rows, device, poison=False)
        runs: list[Callable[[], None]] = []
        start = 0
        for _ in range(self.layers or model.layers):
            state = AttentionState(
                base.qkv, torch.randn_like(base.keys), torch.randn_like(base.values), base.cosines, base.sines,
                base.lengths, base.out,
            )  # fmt: skip
            self.states.append(state)
            sources = {"qkv": self.hidden, "o": base.out, "gate_up": self.hidden, "down": gated}
            outs = {"qkv": base.qkv, "o": self.hidden, "gate_up": gated, "down": self.hidden}
            for product in layer:
                runs += self._product(product, sources[product.name], outs[product.name], norm, normed, start)
                start += product.n * product.k
                if product.name == "qkv":
                    runs.append(
                        attention_launcher(
                            self.target, self.attention, model, state, scratch, window=0, early=self.early
                        )
                    )
        return runs + self._product(head, self.hidden, self.logits, norm, normed, start)

    def _product(self, product: Any, x: Any, out: Any, norm: Any, normed: Any, start: int) -> list[Callable[[], None]]:
        choice, runs = self.choices[product.name], []
        if product.norm and self.rows > MOST_NORMALIZED_ROWS:
            runs.append(norm_launcher(self.target, x, norm, normed, early=self.early))
            x = normed
        weights = self.pool.weights(product, start)
        run = launcher(
            self.target, choice.variant, product, weights, x, norm, self.hidden, out, persistent=choice.persistent,
            early=self.early and choice.early,
        )  # fmt: skip
        return [*runs, run]

    def expected(self, hidden: Any, states: list[AttentionState]) -> Any:
        """Logits of the same step, from `hidden` and the caches as they were before it."""
        *layer, head = self.model.products()
        norm = torch.ones(self.model.hidden, device=self.target.device)
        start = 0
        for state in states:
            x = hidden
            for product in layer:
                weights = dequantized(*self.pool.weights(product, start))
                out = expected(product, x, weights, norm, hidden, normalize=product.norm).half()
                start += product.n * product.k
                if product.name == "qkv":
                    state.qkv = out
                    x = expected_attention(self.model, state, 0)[0].half()
                elif product.name == "o":
                    hidden = x = out
                elif product.name == "gate_up":
                    x = out
                else:
                    hidden = out
        return expected(head, hidden, dequantized(*self.pool.weights(head, start)), norm, hidden, normalize=True)


def check_step(step: Step) -> float:
    """The relative error of the logits."""
    runs = step.launches()
    assert step.states is not None
    before = step.hidden.clone()
    states = [
        AttentionState(s.qkv.clone(), s.keys.clone(), s.values.clone(), s.cosines, s.sines, s.lengths, s.out.clone())
        for s in step.states
    ]
    for run in runs:
        run()
    step.target.synchronize()
    return relative_error(step.logits, step.expected(before, states))


def time_step(step: Step, replays: int = 20) -> float:
    """ms of a step."""
    runs = step.launches()

    def work() -> None:
        for run in runs:
            run()

    return step.target.time_us(work, replays) / 1e3
