"""setup.py compiles the CPU kernels that the processor can run, and no source of another's."""

from pathlib import Path

import pytest
from setup_script import ROOT, kernel_library

X86, ARM = "linux-x86_64", "linux-aarch64"


def stems(platform: str) -> set[str]:
    library = kernel_library(platform)
    assert library is not None
    return {Path(source).stem for source in library.sources}


def test_each_processor_has_its_own_and_all_have_the_operators() -> None:
    x86, arm = stems(X86), stems(ARM)
    everywhere = {
        "library",
        "projection_call",
        "quantized_linear",
        "half_linear",
        "group_query_attention",
        "cuda_linear",
    }
    assert x86 & arm == everywhere
    assert {"processor_x86", "block_product_avx2", "block_product_avx512", "attention_amx"} <= x86
    assert arm - everywhere == {
        *("processor_arm", "attention_neon", "half_product_neon", "block_product_neon", "block_product_neon_i8mm")
    }


def test_no_source_is_forgotten() -> None:
    kernels = ROOT / "engine" / "kernels"
    assert stems(X86) | stems(ARM) == {source.stem for source in kernels.glob("*/*.cpp")}


def test_both_are_compiled_by_the_same_flags() -> None:
    x86, arm = kernel_library(X86), kernel_library(ARM)
    assert x86 is not None
    assert arm is not None
    assert x86.flags == arm.flags
    assert "-ffp-contract=off" in arm.flags


@pytest.mark.parametrize("platform", ["linux-riscv64", "macosx-14.0-arm64", "win-amd64"])
def test_elsewhere_there_are_none(platform: str) -> None:
    assert kernel_library(platform) is None
