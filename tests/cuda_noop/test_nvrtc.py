"""The CUDA kernels compile by NVRTC for every architecture that runs them, and hardly a register is spilled."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from noop_cuda import BUNDLES

from starling.engine.bundle.manifest import Bundle
from starling.engine.kernels.cuda.compiler import cubin
from starling.engine.kernels.cuda.operators import ROWS, Product, measured_variants, variant
from starling.engine.kernels.cuda.variants import EPILOGUES, Attention, Linear, Sampling

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120")
#: Of the package nvidia-cuda-cuobjdump.
CUOBJDUMP = next(Path(sys.prefix).glob("lib/python*/site-packages/nvidia/cu13/bin/cuobjdump"))
#: By two of the variants that were the fastest on an H200; the others spill nothing.
MOST_SPILLED = 8
#: Registers and spills of every kernel, of the last run.
REPORT = BUNDLES.parent / "registers.txt"


def sources(architecture: str) -> Iterator[tuple[str, dict[str, int]]]:
    """What an engine compiles for the 7B shape, and the attention that `tune_kernels` tries."""
    measured = measured_variants(architecture.replace("_", ""))
    products = Bundle.open(BUNDLES / "7b-int8-fp16").cuda_kernels
    assert products is not None
    for each in products.products:
        product = Product(each.k, each.n, each.norm, EPILOGUES[each.around])
        for rows in ROWS:
            yield "linear.cu", variant(product, rows, measured).defines()
    yield "linear.cu", Linear(4096, 16, 1).defines()
    yield "attention.cu", Attention(4).defines()
    yield "norm.cu", {}
    yield "dense.cu", {}
    yield from (("sampling.cu", Sampling(bfloat16).defines()) for bfloat16 in (False, True))


def resources(code: bytes, file: Path) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack (what is spilled lies there) of each kernel in a cubin."""
    file.write_bytes(code)
    done = subprocess.run([CUOBJDUMP, "-res-usage", file], capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout)
    return {name: (int(registers), int(stack) + int(local)) for name, registers, stack, local in found}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_compile_and_keep_to_their_registers(architecture: str, tmp_path: Path) -> None:
    wanted: list[tuple[str, dict[str, int]]] = []
    for source in sources(architecture):
        if source not in wanted:
            wanted.append(source)

    def compiled(number: int) -> dict[str, tuple[int, int]]:
        return resources(cubin(*wanted[number], architecture), tmp_path / f"{number}.cubin")

    with ThreadPoolExecutor(2) as pool:  # NVRTC works without Python's lock
        results = [*pool.map(compiled, range(len(wanted)))]
    lines = [
        f"{architecture} {name} {' '.join(map(str, defines.values()))}: {registers} registers, {spilled} bytes spilled"
        for (_, defines), kernels in zip(wanted, results, strict=True)
        for name, (registers, spilled) in kernels.items()
    ]
    with REPORT.open("w" if architecture == ARCHITECTURES[0] else "a", encoding="utf-8") as report:
        report.write("".join(f"{line}\n" for line in lines))
    assert len(lines) >= len(wanted)
    assert not [line for line in lines if int(line.split()[-3]) > MOST_SPILLED]
