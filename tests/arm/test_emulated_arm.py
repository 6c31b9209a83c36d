"""The CPU kernels of this checkout, compiled for ARM, under their own tests on emulated processors: `make test-arm`."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from emulated_arm import FOLDER, EmulatedArm, missing_packages
from numpy.typing import NDArray

from starling.engine.engine import Engine
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.quantization.blocks import BlockQuantization

pytestmark = [pytest.mark.arm, pytest.mark.slow]

#: Processors of QEMU: with products of matrices (i8mm), with dot products alone, and with neither.
MATRICES, DOT_PRODUCTS, NEITHER = "max", "neoverse-n1", "cortex-a72"
LIBRARY = """
import json
from starling.engine.kernels import KernelsUnavailable, require_kernel_library
try:
    library = require_kernel_library()
    print(json.dumps([library.instruction_set, library.fp16, library.bf16]))
except KernelsUnavailable as error:
    print(json.dumps(str(error)))
"""
PROMPT = list(range(5, 45))
ENGINE = f"""
import json, sys
import numpy as np
from starling.engine import Engine
with Engine(sys.argv[1], max_seq=64, threads=2) as engine:
    backend = engine.backend
    logits = backend.prefill(0, np.array({PROMPT}), 0).logits()[0]
    print(json.dumps([backend.kernels, backend.kernels_note, logits.tolist()]))
"""


@pytest.fixture(scope="module")
def arm() -> EmulatedArm:
    """The emulated system, with this checkout compiled for it."""
    if missing := missing_packages():
        pytest.skip(f"missing here: {', '.join(missing)}")
    emulated = EmulatedArm(FOLDER)
    if not emulated.is_prepared():
        pytest.skip("make test-arm prepares what this needs")
    wheel = emulated.build()
    assert wheel.name.endswith("-py3-none-linux_aarch64.whl")
    return emulated


def last_line(finished: "subprocess.CompletedProcess[str]") -> object:
    assert finished.returncode == 0, finished.stdout + finished.stderr
    document: object = json.loads(finished.stdout.splitlines()[-1])
    return document


@pytest.mark.parametrize(
    ("processor", "held_to", "found"),
    [
        (MATRICES, "", ["neon-i8mm", "neon", "neon"]),
        (MATRICES, "neon", ["neon", "neon", "neon"]),
        (DOT_PRODUCTS, "", ["neon", "neon", "neon"]),
        (NEITHER, "", "this processor has no dot products of bytes (SDOT, an option from ARMv8.2 on)"),
    ],
)
def test_the_processor_decides_which_kernels_run(
    arm: EmulatedArm, processor: str, held_to: str, found: list[str] | str
) -> None:
    assert last_line(arm.run(processor, "-c", LIBRARY, STARLING_CPU_ISA=held_to)) == found


# Without i8mm it is the products that differ; the first processor is held to them in half of its own tests.
@pytest.mark.parametrize(
    ("processor", "tests", "chosen", "least"),
    [
        (MATRICES, "test_kernels.py", "not InTheEngine", 500),
        (MATRICES, "test_half_kernels.py", "TestHalfLinear", 100),
        (DOT_PRODUCTS, "test_kernels.py", "TestQuantizedLinear and best", 130),
    ],
)
def test_the_kernels_pass_their_own_tests(
    arm: EmulatedArm, processor: str, tests: str, chosen: str, least: int
) -> None:
    options = ["-q", "-p", "no:cacheprovider", "--noconftest", "-k", chosen]
    finished = arm.run(processor, "-m", "pytest", *options, f"tests/engine/{tests}")
    print(finished.stdout)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    passed = re.search(r"(\d+) passed", finished.stdout)
    assert passed is not None
    assert int(passed[1]) > least
    assert "skipped" not in finished.stdout


def test_hostile_calls_end_in_an_answer_or_a_refusal(arm: EmulatedArm) -> None:
    document = last_line(arm.run(MATRICES, "tests/hostile/operator_cases.py", "100", "1"))
    assert isinstance(document, dict)
    for operator in ("GroupQueryAttention", "QuantizedLinear"):
        assert document["answers"][f"an answer of {operator}"] >= 5


@pytest.fixture(scope="module")
def int8_bundle(tiny_checkpoint: Checkpoint, bundles: Path) -> Path:
    """starling-tiny in int8."""
    out = bundles / "tiny-int8-arm"
    export_bundle(tiny_checkpoint, out, ExportOptions(quantization=BlockQuantization("int8"), check=False))
    return out


def logits_of(arm: EmulatedArm, processor: str, bundle: Path) -> tuple[str | None, str | None, NDArray[np.float64]]:
    document = last_line(arm.run(processor, "-c", ENGINE, str(bundle)))
    assert isinstance(document, list)
    return document[0], document[1], np.array(document[2])


def test_an_engine_gives_on_arm_what_it_gives_here(
    arm: EmulatedArm, int8_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STARLING_CPU_ISA", "avx2")  # whose attention multiplies float32 too
    with Engine(int8_bundle, max_seq=64) as engine:
        expected = engine.backend.prefill(0, np.array(PROMPT), 0).logits()[0].astype(np.float64)
    kernels, note, matrices = logits_of(arm, MATRICES, int8_bundle)
    assert (kernels, note) == ("neon-i8mm", None)
    kernels, note, dot_products = logits_of(arm, DOT_PRODUCTS, int8_bundle)
    assert (kernels, note) == ("neon", None)
    np.testing.assert_array_equal(matrices, dot_products)
    np.testing.assert_allclose(matrices, expected, atol=1e-3)


def test_without_dot_products_the_plain_graph_runs_and_says_why(arm: EmulatedArm, int8_bundle: Path) -> None:
    kernels, note, plain = logits_of(arm, NEITHER, int8_bundle)
    assert kernels is None
    assert note == "without CPU kernels: this processor has no dot products of bytes (SDOT, an option from ARMv8.2 on)"
    with Engine(int8_bundle, max_seq=64) as engine:
        expected = engine.backend.prefill(0, np.array(PROMPT), 0).logits()[0]
    assert np.corrcoef(plain, expected)[0, 1] > 0.99
