"""The CUDA kernels on a card: right first, then how fast, variant by variant; then a whole decode step.

    python -m starling.profiling.gpu.tune_kernels --seconds 75 --out results.jsonl

A line of JSON for each check, timing, choice and failure. A variant that fails is reported and left out; one that takes
the card down with it, too: the program starts itself anew and goes on with the rest. `--emulate` runs the same on the
CPU with a tiny model: no times, but every line of the program and of the kernels.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from starling.engine.kernels.cuda.variants import Attention, Linear
from starling.profiling.gpu.card import NORM, Card, EmulatedCard, Source, Target, start_builders
from starling.profiling.gpu.tuning_report import TuningReport

#: Of a product's or a step's result: its rounding to fp16 alone is 2e-4 to 3e-4.
ERROR_LIMIT, STEP_ERROR_LIMIT = 1e-3, 1e-2
#: Read bandwidth of an H200 as measured, TB/s.
PEAK_TBS = 4.46
_MODULE = "starling.profiling.gpu.tune_kernels"


class Session:
    """Checks and timings of one model on one target."""

    def __init__(self, target: Target, report: TuningReport, tiny: bool) -> None:
        from starling.profiling.gpu.kernel_products import MISTRAL_7B, TINY

        self.target, self.report, self.tiny = target, report, tiny
        self.model = TINY if tiny else MISTRAL_7B
        self.pools: dict[int, Any] = {}
        self.best: dict[tuple[int, int, str], Any] = {}
        self.best_attention: dict[tuple[int, int], Attention] = {}

    def pool(self, bits: int) -> Any:
        from starling.profiling.gpu.kernel_products import Pool

        if bits not in self.pools:
            *layer, head = self.model.products()
            layers = self.model.layers
            elements = sum(product.n * product.k for product in layer) * layers + (head.n + 62) * head.k
            self.pools[bits] = Pool.make(bits, elements, self.target.device)
        return self.pools[bits]

    def variants(self, product: Any, bits: int, rows: int) -> list[Linear]:
        from starling.profiling.gpu.kernel_products import candidates

        found = candidates(product, bits, rows)
        return found[:2] if self.tiny else found

    def sources(self) -> Iterator[Source]:
        """All there is to build, in the order in which it is asked for."""
        from starling.profiling.gpu.kernel_step import attention_candidates

        products = self.model.products()
        yield NORM
        for rows in (1, 2, 4, 8, 16):
            yield from (Source.of(self.variants(product, 8, rows)[0]) for product in products)
        yield from (Source.of(v) for product in products for v in self.variants(product, 8, 1))
        yield from (Source.of(variant) for variant in attention_candidates(self.model))
        for rows in (1, 2, 4, 8, 16):
            yield from (Source.of(self.variants(product, 16, rows)[0]) for product in products)
        for bits, rows in ((16, 1), (8, 16), (8, 4), (16, 16), (16, 4)):
            yield from (Source.of(v) for product in products for v in self.variants(product, bits, rows))

    def check_products(self, bits: int) -> None:
        from dataclasses import replace

        products = self.model.products()
        padded = replace(products[-1], name="lm_head_padded", n=products[-1].n + 62)
        for rows in (1, 2, 4, 8, 16):
            for product in [*products, padded]:
                variant = self.variants(product, bits, rows)[0]
                self.check(variant, product, rows, 0)

    def check(self, variant: Linear, product: Any, rows: int, persistent: int) -> bool:
        from starling.profiling.gpu.kernel_products import check

        def work() -> dict[str, Any]:
            error = check(self.target, variant, product, self.pool(variant.bits), rows, persistent=persistent)
            return {"product": product.name, "m": rows, "error": error, "ok": error < ERROR_LIMIT}

        key = f"check {product.name} m{rows} p{persistent} {tuple(variant.defines().values())}"
        line = self.report.attempt(key, "check", work)
        return line is not None and line["ok"]

    def check_norm(self) -> None:
        import torch

        from starling.profiling.gpu.kernel_products import norm_launcher, normalized, relative_error

        def work() -> dict[str, Any]:
            device = self.target.device
            x, weight = torch.randn(16, self.model.hidden, device=device).half(), torch.rand(self.model.hidden).half()
            weight, out = weight.to(device), torch.full_like(x, float("nan"))
            norm_launcher(self.target, x, weight, out, early=True)()
            self.target.synchronize()
            error = relative_error(out, normalized(x, weight))
            return {"error": error, "ok": error < ERROR_LIMIT}

        self.report.attempt("check norm", "check", work)

    def check_attention(self) -> None:
        from starling.profiling.gpu.kernel_step import attention_candidates, check_attention

        longest = self.model.positions - 257
        cases = [([1], 0), ([5], 0), ([128], 0), ([longest], 0), ([0, 1, 5, 128, longest, 63, 64, 65], 0),
                 ([longest, 5], 100), ([longest] * 16, 0)]  # fmt: skip
        for i, variant in enumerate(attention_candidates(self.model)[: 2 if self.tiny else None]):
            for lengths, window in cases if i < 2 else cases[4:5]:

                def work(v: Attention = variant, lengths: list[int] = lengths, window: int = window) -> dict[str, Any]:
                    error, cache = check_attention(self.target, v, self.model, lengths, window)
                    ok = error < ERROR_LIMIT and cache < 5e-3
                    return {"attention": str(v), "lengths": lengths, "error": error, "cache": cache, "ok": ok}

                self.report.attempt(f"check {variant} {lengths} {window}", "check", work)

    def tune(self, bits: int, rows: int) -> None:
        """The fastest variant of each product, in the form in which a step has it."""
        for product in self.model.products():
            lines = []
            for variant in self.variants(product, bits, rows):
                if not self.check(variant, product, rows, 0):
                    continue
                lines += [
                    self.time(variant, product, rows, persistent, True) for persistent in self.grids(variant, product)
                ]
            timed = sorted((line for line in lines if line), key=lambda line: line[0])
            for _, variant, persistent in timed[:2]:
                self.time(variant, product, rows, persistent, False)
            if timed:
                self.choose(bits, rows, product, *timed[0])

    def grids(self, variant: Linear, product: Any) -> list[int]:
        """0, a block for each tile; and as many blocks as fit at a time, where there are more tiles."""
        try:
            fit = self.target.kernel(Source.of(variant)).blocks_of_a_multiprocessor(variant.threads)
        except Exception:
            return []
        tiles = variant.grid(product.n, self.target.multiprocessors)[0]
        return [0, fit] if fit and tiles > fit * self.target.multiprocessors else [0]

    def time(
        self, variant: Linear, product: Any, rows: int, persistent: int, early: bool
    ) -> tuple[float, Linear, int] | None:
        from starling.profiling.gpu.kernel_products import time_product

        def work() -> dict[str, Any]:
            us = time_product(
                self.target, variant, product, self.pool(variant.bits), rows, persistent=persistent, early=early
            )
            registers, spilled = self.target.kernel(Source.of(variant)).registers()
            return {
                "product": product.name, "bits": variant.bits, "m": rows, "us": round(us, 2),
                "tbs": round(product.bytes(variant.bits) / us / 1e6, 3), "warps": variant.warps,
                "unroll": variant.unroll, "depth": variant.depth, "row_tiles": variant.row_tiles,
                "min_blocks": variant.min_blocks, "persistent": persistent, "early": early, "registers": registers,
                "spilled": spilled,
            }  # fmt: skip

        key = f"time {product.name} m{rows} p{persistent} e{int(early)} {tuple(variant.defines().values())}"
        line = self.report.attempt(key, "timing", work)
        return (line["us"], variant, persistent) if line else None

    def choose(self, bits: int, rows: int, product: Any, us: float, variant: Linear, persistent: int) -> None:
        from starling.profiling.gpu.kernel_step import Choice

        self.best[bits, rows, product.name] = Choice(variant, persistent)
        tbs = product.bytes(bits) / us / 1e6
        self.report.write("best", product=product.name, bits=bits, m=rows, us=us, tbs=round(tbs, 3),
                          share=round(tbs / PEAK_TBS, 3), persistent=persistent, n=product.n,
                          variant=asdict(variant))  # fmt: skip

    def tune_attention(self, rows: int, length: int) -> None:
        from starling.profiling.gpu.kernel_step import attention_candidates, time_attention

        lines = []
        for variant in attention_candidates(self.model)[: 2 if self.tiny else None]:

            def work(variant: Attention = variant) -> dict[str, Any]:
                us = time_attention(self.target, variant, self.model, rows, length)
                read = 4 * rows * self.model.kv_heads * (length + 1) * 128
                return {"attention": str(variant), "m": rows, "length": length, "us": round(us, 2),
                        "tbs": round(read / us / 1e6, 3)}  # fmt: skip

            line = self.report.attempt(f"time {variant} m{rows} {length}", "timing", work)
            lines += [(line["us"], variant)] if line else []
        if lines:
            us, variant = min(lines, key=lambda pair: pair[0])
            self.best_attention[rows, length] = variant
            self.report.write("best", attention=str(variant), m=rows, length=length, us=us)

    def time_torch(self, rows: int) -> None:
        from starling.profiling.gpu.kernel_products import time_torch

        for product in self.model.products():

            def work(product: Any = product) -> dict[str, Any]:
                us = time_torch(self.target, product, self.pool(16), rows)
                return {"product": product.name, "m": rows, "torch_us": round(us, 2),
                        "tbs": round(product.bytes(16) / us / 1e6, 3)}  # fmt: skip

            self.report.attempt(f"torch {product.name} m{rows}", "torch", work)

    def chain(self, bits: int, rows: int, length: int) -> None:
        """A step checked with one layer, then timed with all."""
        from starling.profiling.gpu.kernel_step import Step, attention_candidates, check_step, time_step

        names = [product.name for product in self.model.products()]
        choices = {name: self.best[bits, rows, name] for name in names if (bits, rows, name) in self.best}
        if len(choices) < len(names):
            self.report.write("skipped", what=f"chain {bits} bits m{rows}", missing=sorted({*names} - {*choices}))
            return
        attention = self.best_attention.get((rows, length)) or attention_candidates(self.model)[0]

        def step(early: bool, layers: int) -> Step:
            return Step(self.target, self.model, choices, attention, self.pool(bits), rows, length, early, layers)

        for early in (True, False):

            def right(early: bool = early) -> dict[str, Any]:
                error = check_step(step(early, 2))
                return {"bits": bits, "m": rows, "length": length, "early": early, "error": error,
                        "ok": error < STEP_ERROR_LIMIT}  # fmt: skip

            def timed(early: bool = early) -> dict[str, Any]:
                whole = step(early, 0)
                ms = time_step(whole)
                tbs = whole.bytes(bits) / ms / 1e9
                return {"bits": bits, "m": rows, "length": length, "early": early, "ms": round(ms, 4),
                        "gb": round(whole.bytes(bits) / 1e9, 3), "tbs": round(tbs, 3),
                        "share": round(tbs / PEAK_TBS, 3), "tokens_s": round(rows * 1e3 / ms, 1)}  # fmt: skip

            name = f"{bits} m{rows} {length} e{int(early)}"
            self.report.attempt(f"check step {name}", "check_step", right)
            self.report.attempt(f"step {name}", "step", timed)

    def run(self) -> None:
        lengths = (128, self.model.positions - 256)
        self.check_norm()
        self.check_products(8)
        self.tune(8, 1)
        self.check_attention()
        for length in lengths:
            self.tune_attention(1, length)
            self.chain(8, 1, length)
        self.check_products(16)
        self.tune(16, 1)
        for length in lengths:
            self.chain(16, 1, length)
        self.time_torch(1)
        for rows in (4,) if self.tiny else (16, 4):
            self.tune(8, rows)
            for length in lengths:
                self.tune_attention(rows, length)
                self.chain(8, rows, length)
            self.time_torch(rows)
            self.tune(16, rows)
            for length in lengths:
                self.chain(16, rows, length)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=75.0, help="stop after that long")
    parser.add_argument("--out", type=Path, default=Path("cuda_operators.jsonl"), help="the lines; appended to")
    parser.add_argument("--arch", default="sm_90", help="what to build for")
    parser.add_argument("--emulate", action="store_true", help="a dry run on the CPU")
    parser.add_argument("--started", type=float, default=time.time(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    target: Target = EmulatedCard() if arguments.emulate else Card(start_builders(), arch=arguments.arch)
    report = TuningReport(arguments.out, arguments.seconds, arguments.started, target, _MODULE)
    if isinstance(target, Card):
        warm_up(target)
        target.open()
    session = Session(target, report, arguments.emulate)
    target.announce([*session.sources()])
    threading.Thread(target=report.watch, daemon=True).start()
    report.write("start", device=target.name, multiprocessors=target.multiprocessors)
    session.run()
    report.write("end", seconds=round(time.time() - arguments.started, 1), out_of_time=report.left_s() < 1.0)
    target.close()
    sys.stdout.flush()
    os._exit(0)


def warm_up(card: Card) -> None:
    """Forks the building processes while this one has no CUDA yet."""
    card.announce([NORM])


if __name__ == "__main__":
    sys.exit(main())
