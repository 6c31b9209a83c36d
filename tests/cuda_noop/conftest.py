"""These tests run on ONNX Runtime's CUDA provider and a CUDA that does nothing: `make test-cuda-noop`, nowhere else."""

from collections.abc import Iterator

import pytest

collect_ignore_glob = ["test_*.py"]

try:
    from noop_cuda import BUNDLES, is_loaded, opened
except ImportError:
    pass
else:
    if is_loaded():
        collect_ignore_glob = []


@pytest.fixture(scope="session", autouse=True)
def samples() -> Iterator[None]:
    """Its kernels do nothing, so that no draw is right here: it is drawn without the check."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STARLING_CUDA_SAMPLING", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def provider_starts(samples: None) -> None:
    """Without it, ONNX Runtime would load gigabytes for the CPU before it says so."""
    assert BUNDLES.is_dir(), f"{BUNDLES} is missing: run `make test-cuda-noop`"
    try:
        with opened("tiny-fp16") as backend:
            assert backend.provider == "CUDAExecutionProvider"
    except Exception as error:
        pytest.exit(f"the CUDA provider does not start: {error}", returncode=1)
