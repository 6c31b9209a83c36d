"""Hostile calls of the CPU operators, in a process of their own: `python operator_cases.py ROUNDS SEED`.

A hostile bundle says whatever it likes in attributes, shapes and lengths. Each case must end in an answer or in a
refusal; one that reads or writes where it should not ends this process, or is a report of `make sanitize`. Prints a
JSON object: how many cases there were, and how often each of the answers.
"""

import json
import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
import ml_dtypes
from kernel_models import run_in_place, session
from onnx import helper

Arrays = dict[str, NDArray[Any]]
INT32, INT64 = 2**31, 2**63


class Dice:
    """Seeded choices; most often the first of several."""

    def __init__(self, seed: int) -> None:
        self.random, self.numpy = random.Random(seed), np.random.default_rng(seed)

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def seldom(self, usual: Any, *others: Any) -> Any:
        return usual if self.random.random() < 0.95 else self.random.choice(others)

    def halves(self, kind: Any, *shape: int) -> NDArray[Any]:
        """Of 16 bits, or of 32: what one of 16 cannot hold is infinite."""
        with np.errstate(over="ignore"):
            return self.floats(*shape).astype(kind)

    def floats(self, *shape: int) -> NDArray[np.float32]:
        values = self.numpy.standard_normal(shape).astype(np.float32)
        if self.random.random() < 0.1:
            values[...] = self.pick(np.nan, np.inf, 1e38, 1e-40)
        return values


def attention(dice: Dice, **forced: Any) -> str:
    """One call of GroupQueryAttention; `forced` replaces attributes and, as `lengths`, what is fed."""
    pick, seldom = dice.pick, dice.seldom
    kv_heads, head_dim = pick(1, 2, 3, 8), seldom(pick(16, 32, 48, 64, 128, 256), 0, 8, 272)
    heads = seldom(kv_heads * pick(1, 2, 4, 9, 16, 128), kv_heads + 1)
    rows, tokens = seldom(pick(1, 2, 5), 0), seldom(pick(1, 2, 3, 7, 16, 64, 97), 0)
    positions, packed, rotates = pick(1, 2, 16, 33, 64, 200, 513, 1025), pick(True, False), pick(True, True, False)
    width = (heads + 2 * kv_heads if packed else heads) * head_dim + seldom(0, 1)
    fed: Arrays = {"query": dice.floats(rows, tokens, width)}
    if not packed:
        fed["key"] = dice.floats(rows, tokens, kv_heads * head_dim)
        fed["value"] = dice.floats(rows, tokens + seldom(0, 1), kv_heads * head_dim)
    fed["lengths"] = _lengths(dice, rows, tokens, positions) if "lengths" not in forced else forced.pop("lengths")
    fed["total"] = np.array([positions], np.int32)
    weights: Arrays = {}
    if rotates:
        half = seldom(head_dim // 2, head_dim // 4, 0, head_dim)
        angles = seldom(positions, 1, positions + 5)
        weights = {"cos": dice.floats(angles, half), "sin": dice.floats(angles, half + seldom(0, 1))}
    kind = np.dtype(pick(np.float32, np.float16, ml_dtypes.bfloat16))
    cache = {
        "past_key": dice.halves(kind, rows, kv_heads, positions, head_dim),
        "past_value": dice.halves(kind, rows, seldom(kv_heads, kv_heads + 1), positions, head_dim),
    }
    given = {*fed, *cache, *weights}
    names = ["query", "key", "value", "past_key", "past_value", "lengths", "total", "cos", "sin"]
    attributes = {
        "num_heads": seldom(heads, 0, -1, 2**32 + heads, INT64 - 1, -INT64),
        "kv_num_heads": seldom(kv_heads, 0, -1, 2**32 + kv_heads, INT64 - 1),
        "scale": 0.1,
        "local_window_size": pick(-1, 0, 1, 5, 64, INT32 - 1, INT32, 2**32 + 1, INT64 - 1, -INT64),
        "do_rotary": int(seldom(rotates, not rotates)),
        "rotary_interleaved": pick(0, 1),
        "reduced_precision": pick(0, 1),
    } | forced
    running = session(
        "GroupQueryAttention",
        "starling",
        [name if name in given else "" for name in names],
        ["y", "present_key", "present_value"],
        output_types=dict.fromkeys(("present_key", "present_value"), helper.np_dtype_to_tensor_dtype(kind)),
        fed={**fed, **cache},
        weights=weights,
        threads=pick(1, 2),
        **attributes,
    )
    run_in_place(running, fed, cache)
    return "an answer of GroupQueryAttention"


def _lengths(dice: Dice, rows: int, tokens: int, positions: int) -> NDArray[np.int32]:
    """seqlens_k: the last valid position of each row, or what a hostile graph makes of it."""
    spread = max(positions - tokens, 0)
    lengths = [tokens - 1 + dice.random.randrange(spread + 1) for _ in range(rows)]
    if dice.random.random() < 0.4:
        hostile = (-1, tokens - 2, positions, INT32 - 1, INT32 - 2, -INT32, -INT32 + tokens, -(2**30))
        lengths = [dice.seldom(dice.pick(*hostile), length) for length in lengths]
    if rows == 1 and dice.random.random() < 0.3:
        return _parts(dice, tokens, positions)
    return np.array(dice.seldom(lengths, [*lengths, 0]), np.int32)


def _parts(dice: Dice, tokens: int, positions: int) -> NDArray[np.int32]:
    """seqlens_k of parts: row, first position and tokens of each, or what a hostile graph makes of them."""
    first = dice.random.randrange(tokens + 1)
    numbers = [0, dice.random.randrange(max(positions - first, 1)), first, dice.pick(0, 1, 2), 0, tokens - first]
    numbers = numbers[: dice.seldom(dice.pick(3, 6), 2, 5)]
    if dice.random.random() < 0.4:
        hostile = (-1, positions, INT32 - 1, -INT32, 2**30, -(2**30))
        numbers = [dice.seldom(number, *hostile) for number in numbers]
    return np.array(numbers, np.int32)


def linear(dice: Dice, **forced: Any) -> str:
    """One call of QuantizedLinear; `forced` replaces attributes."""
    pick, seldom = dice.pick, dice.seldom
    inputs, outputs = pick(1, 2, 31, 32, 33, 64, 100, 576, 1000), pick(1, 2, 15, 16, 17, 31, 32, 33, 64, 96, 200)
    gated, rows, blocks = pick(True, False), pick(0, 1, 2, 3, 5, 17, 97, 200), -(-inputs // 32)
    scales = dice.numpy.uniform(0.5, 2, (outputs, blocks)).astype(np.float16).astype(np.float32) / 128
    scales[0, 0] = seldom(scales[0, 0], np.nan, np.inf, -1, 1e-30, 0.1, 65504 * 2, 0, 5.96e-8)
    bits = pick(8, 4)
    data = dice.numpy.integers(0, 256, (outputs, blocks, 4 * bits), dtype=np.uint8)
    weights: Arrays = {"data": seldom(data, data[:, :, :-1], data[:-1], data[:0]), "scales": scales}
    if (bits == 4 and pick(True, False)) or seldom(False, True):
        zeros = dice.numpy.integers(0, 256, (outputs, -(-blocks // 2)), dtype=np.uint8)
        weights["zero_points"] = seldom(zeros, zeros[:-1], zeros[:, :-1], zeros.repeat(2))
    shape = (rows, inputs + seldom(0, 1, -1))
    fed: Arrays = {"x": dice.floats(*seldom(shape, (1, *shape), shape[1:]))}
    width = outputs // 2 if gated else outputs
    if pick(True, False):
        weights["norm_weight"] = dice.floats(inputs + seldom(0, 1))
    if pick(True, False):
        weights["bias"] = dice.floats(max(outputs + seldom(0, -1), 0))
    if pick(True, False):
        fed["residual"] = dice.floats(rows, width + seldom(0, 1))
    given = {*fed, *weights}
    names = ["x", "data", "scales", "norm_weight", "bias", "residual", "zero_points"]
    if dice.random.random() < 0.02 and "zero_points" in weights:
        fed["zero_points"] = weights.pop("zero_points")
    attributes = {
        "K": seldom(inputs, inputs + 32, 2**32 + inputs, -inputs, 2**30, INT32 - 1, INT64 - 1),
        "N": seldom(outputs, outputs + 1, 2**32 + outputs, 0, INT32 - 1, -INT64),
        "bits": seldom(bits, 12 - bits, 0, -4, 2, 16, 2**32 + bits, INT64 - 1),
        "block_size": 32,
        "planes": seldom(pick(1, 2), 0, 3, -1, 2**32 + 1),
        "gated": int(gated),
        "epsilon": pick(1e-5, 0.0, float("nan")),
    } | forced
    running = session(
        "QuantizedLinear",
        "starling",
        [name if name in given else "" for name in names],
        ["y"],
        fed=fed,
        weights=weights,
        threads=pick(1, 2),
        **attributes,
    )
    running.run(None, fed)
    return "an answer of QuantizedLinear"


def half_linear(dice: Dice, **forced: Any) -> str:
    """One call of HalfLinear; `forced` replaces attributes."""
    pick, seldom = dice.pick, dice.seldom
    inputs, outputs = pick(1, 2, 31, 32, 33, 64, 100, 576, 1000), pick(1, 2, 15, 16, 17, 31, 32, 33, 64, 96, 200)
    gated, transposed, rows = pick(True, False), pick(True, False), pick(0, 1, 2, 3, 5, 7, 8, 9, 16, 17, 97, 200)
    stored = (inputs, outputs) if transposed else (outputs, inputs)
    kind = pick(np.float16, ml_dtypes.bfloat16)
    weight = dice.halves(kind, *seldom(stored, stored[::-1], (1, *stored), (stored[0], 0)))
    shape = (rows, inputs + seldom(0, 1, -1))
    fed: Arrays = {"x": dice.floats(*seldom(shape, (1, *shape), shape[1:]))}
    weights: Arrays = {"weight": weight}
    width = outputs // 2 if gated else outputs
    if pick(True, False):
        weights["norm_weight"] = dice.floats(inputs + seldom(0, 1))
    if pick(True, False):
        weights["bias"] = dice.floats(max(outputs + seldom(0, -1), 0))
    if pick(True, False):
        fed["residual"] = dice.floats(rows, width + seldom(0, 1))
    given = {*fed, *weights}
    attributes = {
        "K": seldom(inputs, inputs + 32, 2**32 + inputs, -inputs, 2**30, INT32 - 1, INT64 - 1),
        "N": seldom(outputs, outputs + 1, 2**32 + outputs, 0, INT32 - 1, -INT64),
        "transposed": int(transposed),
        "gated": int(gated),
        "epsilon": pick(1e-5, 0.0, float("nan")),
    } | forced
    running = session(
        "HalfLinear",
        "starling",
        [name if name in given else "" for name in ("x", "weight", "norm_weight", "bias", "residual")],
        ["y"],
        fed=fed,
        weights=weights,
        threads=pick(1, 2),
        **attributes,
    )
    running.run(None, fed)
    return "an answer of HalfLinear"


def known(dice: Dice) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Calls that once read outside their memory, and their neighbours: every one, many times over."""
    for _ in range(20):
        for length in (-INT32, -INT32 + 1, INT32 - 1):
            yield attention, {"lengths": np.full(dice.pick(1, 2, 5), length, np.int32)}
        for heads in (2**32 + 1, 2**32 + 2, 2**32 + 8):
            yield attention, {"num_heads": heads, "kv_num_heads": 2**32 + 1}
        for size in (2**32 + 32, 2**32 + 576):
            yield linear, {"K": size}
            yield linear, {"N": size}
            yield half_linear, {"K": size}
            yield half_linear, {"N": size}


def main(rounds: int, seed: int) -> dict[str, Any]:
    """Run the known cases and `rounds` random ones."""
    dice, answers = Dice(seed), Counter[str]()
    cases = [*known(dice), *((dice.pick(attention, linear, half_linear), {}) for _ in range(rounds))]
    for operator, forced in cases:
        os.environ["STARLING_CPU_ISA"] = dice.pick("", "avx-vnni", "avx512", "avx2")
        try:
            answers[operator(dice, **forced)] += 1
        except Exception as error:  # ONNX Runtime's own classes; what matters is that it is one, and not a crash
            answers[str(error).split(": ")[-1].strip()[:80]] += 1
    return {"cases": len(cases), "answers": dict(answers.most_common())}


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]))))
