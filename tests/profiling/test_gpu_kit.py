"""The kit that measures a GPU, in a dry run: packed, run on the CPU and on a stand-in for CUDA."""

import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_stand_in import cuda_backend
from host_device import HostDevice

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError
from starling.engine.kernels.cuda.operators import MEASURED
from starling.profiling.gpu import on_card, pack, report, report_tables
from starling.profiling.gpu.packing.fat_binaries import trimmed
from starling.profiling.gpu.packing.small_runtime import Reachable, write_small_runtime
from starling.profiling.gpu.stages import GRAPHS, SHARED, correctness, large_weights, throughput
from starling.profiling.gpu.stages.kernel_tuning import as_measured, measured_variants
from starling.profiling.gpu.stages.kit import Kit
from starling.profiling.gpu.stages.machines import CpuMachine, CudaMachine
from starling.profiling.gpu.stages.random_bundles import WEIGHT_FILE, fill_bundle, random_model
from starling.profiling.gpu.stages.results_file import FILE, Results, read_results
from starling.profiling.gpu.stages.stage_table import STAGES

pytestmark = pytest.mark.slow

FP16, INT8 = "tiny-fp16", "tiny-int8-fp16"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kit's small bundles, without ONNX Runtime."""
    out = tmp_path_factory.mktemp("packed") / "kit"
    pack.pack(out, names=[FP16, INT8], wheel=None, runtime=False, architecture=90, say=lambda _: None)
    return out


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def kit(packed: Path, work: Path, tmp_path: Path) -> Kit:
    return Kit(work, packed / GRAPHS, Results(tmp_path / FILE, "a stage"), CpuMachine())


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("starling-tiny", torch.float32, "cpu")


def lines(kit: Kit) -> list[dict[str, Any]]:
    return read_results(kit.results.path)


class StandIn(CudaMachine):
    """The backend for CUDA on ONNX Runtime's CPU provider and a device that does its work late."""

    torch_device = "cpu"

    def open(
        self,
        bundle: Bundle,
        *,
        rows: int,
        positions: int,
        chunk: int | None = None,
        capture: bool = True,
        kernels: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> Any:
        room = {"max_seq": positions, "max_batch": rows, "prefill_chunk": chunk or 64}
        return cuda_backend(bundle, HostDevice(), **room, capture=capture)

    def memory_in_use(self) -> int:
        return 0


def test_a_bundle_is_carried_without_its_weights(packed: Path) -> None:
    assert not [*packed.rglob(WEIGHT_FILE)]
    assert pack.size(packed) < 3_000_000
    assert (packed / GRAPHS / SHARED / "tokenizer.json").is_file()
    assert json.loads((packed / "kit.json").read_text())["bundles"] == [FP16, INT8]


def test_one_set_of_weights_gives_the_same_logits_in_pytorch_and_in_a_quantized_bundle(kit: Kit, model: Any) -> None:
    bundle = fill_bundle(kit, INT8, model)
    assert Bundle.open(bundle.folder, verify=True).weights.bytes == bundle.weights.bytes
    correctness.check(kit, bundle, model, [correctness.Case(2, 40, 16)], kernels=False)
    assert [line["ok"] for line in lines(kit) if "ok" in line] == [True, True]


def test_ways_of_decoding_are_compared_on_a_stand_in_for_cuda(kit: Kit, model: Any) -> None:
    kit = replace(kit, machine=StandIn())
    bundle = fill_bundle(kit, FP16, model)
    correctness.compare(kit, bundle, model, correctness.Case(2, 40, 16), kernels=False)
    correctness.compare_ways(kit, bundle, kernels=False)
    _, compared, launched, fed, plain, ways = lines(kit)
    assert compared["ok"]
    assert [way["captured"] for way in (launched, fed, plain)] == [True, True, False]
    assert ways["ok"]
    assert ways["different_tokens"] > 10


def test_a_wrong_bundle_is_seen(kit: Kit, model: Any) -> None:
    bundle = fill_bundle(kit, FP16, model)
    other = random_model("starling-tiny", torch.float32, "cpu")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.mul_(1.1)
    correctness.compare(kit, bundle, other, correctness.Case(1, 20), kernels=False)
    assert lines(kit)[-1]["ok"] is False


def test_steps_are_timed(kit: Kit) -> None:
    large_weights.run(kit)
    throughput.run_int8(kit)
    against, step, room, *_ = [line for line in lines(kit) if "label" in line]
    assert against["kl_mean"] < 1e-3
    assert step["step_bytes"] > 7_000_000
    assert step["tok_s"] == pytest.approx(1e3 / step["step_ms"], rel=0.01)
    assert room["cache"] == 2 * 2 * 8 * 128 * 128 * 2  # layers, sides, heads, head size, positions, bytes


def run_on_card(packed: Path, tmp_path: Path, *stages: str) -> tuple[int, list[dict[str, Any]]]:
    """The program as it is started on the card, with --cpu; its exit code and what it wrote."""
    command = [sys.executable, "-m", on_card.__name__, tmp_path / "work", packed / GRAPHS, *stages]
    done = subprocess.run([*command, "--cpu", "--out", tmp_path / "out"], capture_output=True, text=True, check=False)
    return done.returncode, read_results(tmp_path / "out" / FILE)


def test_a_stage_that_fails_or_takes_too_long_says_so_and_the_next_goes_on(packed: Path, tmp_path: Path) -> None:
    code, found = run_on_card(packed, tmp_path, "int8", "peers:1", "roof")
    ends = {line["stage"]: line["exit_code"] for line in found if "done_s" in line}
    assert code == 1
    assert ends == {"environment": 0, "int8": 1, "peers": 124, "roof": 0}
    assert [line["stage"] for line in found if "failed" in line] == ["int8", "peers"]
    assert found[0]["versions"]["torch"] == torch.__version__
    assert next(line for line in found if line["stage"] == "roof")["read_TBs"] >= 0


@pytest.mark.slow
def test_every_stage_runs_on_the_cpu(packed: Path, tmp_path: Path) -> None:
    wanted = ["correctness", "weights", *(s.name for s in STAGES if s.name not in ("correctness", "weights"))]
    code, found = run_on_card(packed, tmp_path, *(f"{name}:200" for name in wanted))
    assert code == 0
    assert not [line for line in found if "failed" in line or line.get("ok") is False]
    kernels = next(line for line in found if line["stage"] == "kernels")
    assert kernels["right"] > 0
    assert not kernels["wrong"]
    commands = [line for line in found if line["stage"] == "command" and "what" in line]
    assert [line["exit_code"] for line in commands] == [0] * 4
    assert commands[0]["document"]["measurements"]


def test_the_best_variants_are_written_as_the_engine_reads_them() -> None:
    text = MEASURED.read_text(encoding="utf-8")
    assert as_measured(json.loads(text)) == text
    variant = {"k": 4096, "bits": 8, "rows": 16, "norm": False, "epilogue": 1, "row_tiles": 2, "warps": 16}
    variant |= {"unroll": 2, "depth": 1, "min_blocks": 1, "persistent": 0}
    best = {"event": "best", "product": "o", "bits": 8, "m": 16, "n": 4096, "persistent": 2, "variant": variant}
    chosen = {"row_tiles": 2, "warps": 16, "unroll": 2, "depth": 1, "min_blocks": 1, "persistent": 2}
    assert measured_variants([best, best | {"bits": 16}]) == {"4096,4096,8,1": chosen, "4096,4096,16,1": chosen}


def fat_binary(*pieces: tuple[int, int, bytes]) -> bytes:
    """Device code as it lies in a library: (kind, architecture, content)."""
    entries = b"".join(
        struct.pack("<HHIQ12xI", kind, 1, 64, len(content), architecture).ljust(64, b"\0") + content
        for kind, architecture, content in pieces
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(entries)) + entries


def test_machine_code_of_other_architectures_and_unreachable_kernels_is_zeroed() -> None:
    first = fat_binary((2, 80, b"eighty" * 9), (2, 90, b"ninety" * 9), (1, 90, b"ptx" * 20))
    second = fat_binary((2, 90, b"unused" * 9))
    library = b"host code" + first + b"more host code" + second + b"\x50\xed\x55\xba chance"
    all_kernels = trimmed(library, 90)
    assert (all_kernels.kept_bytes, all_kernels.zeroed_bytes) == (108, 114)
    assert b"unused" in all_kernels.content
    reachable = trimmed(library, 90, {len(b"host code")})
    assert reachable.content == library.replace(b"eighty", bytes(6)).replace(b"ptx", bytes(3)).replace(
        b"unused", bytes(6)
    )


def test_the_runtime_is_packed_without_what_no_session_loads(tmp_path: Path) -> None:
    wheel, archive = tmp_path / "onnxruntime.whl", tmp_path / "small.tar.xz"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("onnxruntime/__init__.py", "")
        files.writestr("onnxruntime/tools/convert.py", "")
        files.writestr("onnxruntime/capi/libonnxruntime.so.1", b"")
        files.writestr("onnxruntime/capi/libonnxruntime_providers_cuda.so", b"host" + fat_binary((2, 90, b"x" * 64)))
    said: list[str] = []
    write_small_runtime(wheel, archive, 90, said.append)
    with tarfile.open(archive) as packed:
        assert packed.getnames() == ["onnxruntime/__init__.py", "onnxruntime/capi/libonnxruntime_providers_cuda.so"]
    assert "another CUDA library" in said[0]
    assert len(Reachable.read().offsets) == 282
    site = on_card._unpacked(archive, tmp_path / "site")
    assert (site / "onnxruntime" / "__init__.py").is_file()


def test_the_tables_of_the_page_are_those_of_the_measurements() -> None:
    root = Path(pack.__file__).resolve().parents[2]
    page = (root / "docs" / "measurements.md").read_text(encoding="utf-8")
    document = report.read_document(root / "profiling" / "results" / "cuda-h200.json")
    for table in report_tables.all_tables(document).split("\n\n"):
        assert table in page


def test_a_run_is_added_with_its_shares_and_what_all_of_its_results_have_in_common(tmp_path: Path) -> None:
    about = {"device": "Some card", "driver": "1.2", "date": "2030-01-02T03:04:05", "kit": {"commit": "abc"}}
    step = {"how": "starling", "label": "our kernels", "rows": 1, "prompt": 128, "tok_s": 500.0}
    found = [
        {"stage": "environment", **about},
        {"stage": "environment", "done_s": 1.0, "exit_code": 0},
        {"stage": "roof", "at_s": 2.0, "read_TBs": 4.0, "copy_TBs": 3.0},
        {"stage": "int8", "at_s": 3.0, **step, "step_ms": 2.0, "step_bytes": 6_000_000_000},
        {"stage": "int8", "failed": "RuntimeError: no memory", "rows": 4},
    ]
    file, into = tmp_path / "results.jsonl", tmp_path / "cuda-some.json"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in found) + '{"stage": "int')
    run = report.as_run(read_results(file), {"label": "after", "commit": None})
    assert (run["commit"], run["date"], run["device"], run["driver"]) == ("abc", "2030-01-02", "Some card", "1.2")
    assert run["defaults"] == {"int8": "our kernels"}
    assert [line.get("share") for line in run["measurements"]] == [None, 0.75, None]
    document = report.read_document(into)
    for _ in range(2):
        report.add(document, run)
    report.write_document(into, document)
    assert report.read_document(into) == document
    assert len(document["runs"]) == 1
    assert "| int8, our kernels | 1 | 500 | - | 75% |" in report_tables.all_tables(document)


def test_a_run_that_did_not_measure_the_bandwidth_is_refused() -> None:
    given = {"label": "after", "commit": "abc", "date": "2030-01-02"}
    with pytest.raises(UserError, match="--read-tbs"):
        report.as_run([{"stage": "int8", "at_s": 1.0}], given)
