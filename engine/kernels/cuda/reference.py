"""What the kernels compute, in NumPy and double precision."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


def dequantized(data: Array, scales: Array) -> NDArray[np.float32]:
    """uint8 [N, K] with zero point 128 and a scale for each 32 of K, as float32 [N, K]."""
    blocks = data.astype(np.float32).reshape(data.shape[0], -1, 32) - 128
    return np.asarray((blocks * scales.astype(np.float32)[:, :, None]).reshape(data.shape), np.float32)


def rms_norm(x: Array, weight: Array, epsilon: float) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight.astype(np.float64))


def linear(
    x: Array, weights: Array, norm: Array | None, epsilon: float, residual: Array | None, *, gated: bool
) -> NDArray[np.float64]:
    """[M, K] by [N, K]: [M, N], or [M, N / 2] where gated (the gate's rows first)."""
    inputs = x.astype(np.float64) if norm is None else rms_norm(x, norm, epsilon)
    out = inputs @ weights.astype(np.float64).T
    if gated:
        gate, value = np.split(out, 2, axis=1)
        out = gate / (1 + np.exp(-gate)) * value
    return np.asarray(out if residual is None else out + residual.astype(np.float64))


def relative_error(out: Array, expected: Array) -> float:
    """Of the norms; NaN, which no limit lets pass, where an element is not a number."""
    difference = out.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def rotate(x: Array, cosines: Array, sines: Array, position: int) -> NDArray[np.float16]:
    """[..., head_dim], the halves of a head against each other; as float16, as which it goes on."""
    low, high = np.split(x.astype(np.float32), 2, axis=-1)
    cosine, sine = (table[position].astype(np.float32) for table in (cosines, sines))
    both = np.concatenate([low * cosine - high * sine, high * cosine + low * sine], -1)
    return np.asarray(both, np.float16)


def attention(
    qkv: Array, keys: Array, values: Array, cosines: Array, sines: Array, lengths: Array, window: int, scale: float
) -> tuple[NDArray[np.float64], Array, Array]:
    """One position of each row: [rows, heads * head_dim], and the caches [rows, kv_heads, max, head_dim] with it."""
    rows, kv_heads, _, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    keys, values = keys.copy(), values.copy()
    out = np.zeros((rows, heads, head_dim))
    for row in range(rows):
        past = int(lengths[row])
        each = qkv[row].reshape(-1, head_dim)
        q = rotate(each[:heads], cosines, sines, past).astype(np.float64)
        keys[row, :, past] = rotate(each[heads : heads + kv_heads], cosines, sines, past)
        values[row, :, past] = each[heads + kv_heads :]
        begin = max(0, past + 1 - window) if window else 0
        for head in range(heads):
            seen = keys[row, head * kv_heads // heads, begin : past + 1].astype(np.float64)
            scores = seen @ q[head] * scale
            weights = np.exp(scores - scores.max())
            out[row, head] = weights / weights.sum() @ values[row, head * kv_heads // heads, begin : past + 1]
    return out.reshape(rows, -1), keys, values


class Draws(NamedTuple):
    """How the token after each row of logits [rows, vocabulary] is drawn: [rows] each. top_k 1: the likeliest."""

    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    #: In [0, 1).
    uniform: NDArray[np.float32]


def kept_weights(logits: Array, temperature: float, top_k: int, top_p: float, min_p: float) -> NDArray[np.float64]:
    """What may be drawn, in proportion: [vocabulary], of logits likewise, the likeliest's is 1."""
    scores = logits.astype(np.float64)
    weights = np.exp((scores - scores.max()) / temperature)
    if 0 < top_k < len(weights):
        weights[weights < np.sort(weights)[-top_k]] = 0
    if top_p < 1:
        descending = np.sort(weights)[::-1]
        weights[weights < descending[np.searchsorted(np.cumsum(descending), top_p * weights.sum())]] = 0
    weights[weights < min_p] = 0
    return np.asarray(weights)


def sampled(logits: Array, draws: Draws) -> NDArray[np.int64]:
    """The tokens [rows]; -1 where the greatest logit is not finite."""
    tokens = []
    for row, temperature, top_k, top_p, min_p, uniform in zip(logits.astype(np.float64), *draws, strict=True):
        if not np.isfinite(row.max()):
            tokens.append(-1)
        elif top_k == 1:
            tokens.append(int(row.argmax()))
        else:
            running = np.cumsum(kept_weights(row, temperature, top_k, top_p, min_p))
            tokens.append(int(np.searchsorted(running, uniform * running[-1], side="right")))
    return np.array(tokens, np.int64)
