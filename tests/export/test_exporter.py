"""The bundle folder: what it holds, that it is whole or absent, and that it is PyTorch's equal."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import StarlingError, UnsupportedModelError, UserError
from starling.engine.progress import Silent
from starling.export.check.parity import Parity, require_fp32
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.dialects import DIALECTS
from starling.export.exporter import ExportOptions, export_bundle
from starling.export.tracing.tracer import trace
from starling.export.weights.weight_plan import weight_of

pytestmark = pytest.mark.slow


def manifest_of(bundle: Path) -> dict:
    return json.loads((bundle / "bundle.json").read_text())


def test_fp32_agrees_with_pytorch_to_a_thousandth(demo_bundle: Path) -> None:
    parity = manifest_of(demo_bundle)["parity"]
    assert parity["max_abs_logit_diff"] < 1e-3
    assert parity["top1_agreement"] == 1.0
    assert parity["layers"] == 30


def test_every_file_is_listed_with_its_digest(tiny_bundle: Path) -> None:
    listed = set(manifest_of(tiny_bundle)["files"])
    present = {f.relative_to(tiny_bundle).as_posix() for f in tiny_bundle.rglob("*") if f.is_file()}
    assert present == listed | {"bundle.json"}
    Bundle.open(tiny_bundle, verify=True)


def test_inputs_are_named_as_optimum_names_them(tiny_bundle: Path) -> None:
    graph = manifest_of(tiny_bundle)["graph"]
    inputs, outputs = ([t["name"] for t in graph[side]] for side in ("inputs", "outputs"))
    assert inputs[0] == "input_ids"
    assert [n for n in inputs if n.startswith("past_key_values")] == [
        f"past_key_values.{i}.{side}" for i in range(2) for side in ("key", "value")
    ]
    presents = [f"present.{i}.{side}" for i in range(2) for side in ("key", "value")]
    assert outputs == ["logits", *presents, "next_tokens"]
    assert graph["outputs"][0]["shape"] == ["batch", "kept", 32002]
    assert graph["outputs"][-1]["shape"] == ["batch", "kept"]


def test_the_serving_graph_is_fused(demo_bundle: Path) -> None:
    """Per layer one packed projection, one attention, one output, one gate-and-up, one down; two fused norms."""
    graph = onnx.load(demo_bundle / "model.onnx", load_external_data=False).graph
    nodes = [n.op_type for n in graph.node]
    assert nodes.count("GroupQueryAttention") == 30
    assert nodes.count("MatMul") == 4 * 30
    assert nodes.count("SkipSimplifiedLayerNormalization") == 2 * 30
    assert nodes.count("SimplifiedLayerNormalization") == 1
    named = [n.output[1:3] for n in graph.node if n.op_type == "SkipSimplifiedLayerNormalization"]
    assert not any(any(outputs) for outputs in named), "an output that nothing reads is asked for"
    assert not {"Transpose", "Softmax", "Cos", "Pow", "Linear", "Embedding"} & set(nodes)


def test_the_canonical_graph_is_standard_onnx(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "bundle", ExportOptions(dialect="canonical", check=True))
    model = onnx.load(tmp_path / "bundle" / "model.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 24)]
    onnx.checker.check_model(str(tmp_path / "bundle" / "model.onnx"), full_check=True)


def test_the_trace_needs_no_weights(tiny_checkpoint: Checkpoint) -> None:
    traced = trace(tiny_checkpoint.config, DIALECTS["ort"](), "fp16")
    planned = [v for v in traced.model.graph.initializers.values() if weight_of(v) is not None]
    assert len(planned) == 2 * 9 + 3 + 2  # per layer 7 projections and 2 norms; ends and last norm; rotary tables
    assert traced.architecture.parameters == sum(
        int(torch.Size(tiny_checkpoint.tensors.shape(n)).numel()) for n in tiny_checkpoint.tensors.names()
    )


def test_a_weight_beyond_float16_is_refused(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    class Huge:
        """The same tensors with one value that float16 does not have."""

        names, shape = tiny_checkpoint.tensors.names, tiny_checkpoint.tensors.shape

        def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
            rows = tiny_checkpoint.tensors.rows(name, start, stop)
            return rows + 1e6 if name == "model.norm.weight" else rows

    checkpoint = Checkpoint(
        "random", "huge", tiny_checkpoint.config, Huge(), tiny_checkpoint.tokenizer, tiny_checkpoint.generation
    )
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight.*--dtype bf16"):
        export_bundle(checkpoint, tmp_path / "bundle", ExportOptions(dtype="fp16"))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    keep = tmp_path / "mine" / "thesis.txt"
    keep.parent.mkdir()
    keep.write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match="mine"):
            export_bundle(tiny_checkpoint, keep.parent, ExportOptions(force=force))
    assert keep.read_text() == "years of work"


def test_force_replaces_a_bundle(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    export_bundle(tiny_checkpoint, out, ExportOptions())
    with pytest.raises(UserError, match="--force"):
        export_bundle(tiny_checkpoint, out, ExportOptions(dtype="fp16"))
    export_bundle(tiny_checkpoint, out, ExportOptions(dtype="fp16", force=True))
    assert manifest_of(out)["dtype"] == "fp16"
    assert [f.name for f in tmp_path.iterdir()] == ["bundle"]


def test_a_failure_leaves_nothing_and_keeps_the_old_bundle(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    class Stopping(Silent):
        def bytes(self, done: int, total: int) -> None:
            raise KeyboardInterrupt

    out = tmp_path / "bundle"
    export_bundle(tiny_checkpoint, out, ExportOptions())
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint, out, ExportOptions(dtype="fp16", force=True), Stopping())
    assert manifest_of(out)["dtype"] == "fp32"
    assert [f.name for f in tmp_path.iterdir()] == ["bundle"]


def test_what_a_killed_export_left_is_cleared_by_the_next(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from starling.export.checkpoints.model_source import open_checkpoint
from starling.engine.progress import Silent
from starling.export.exporter import ExportOptions, export_bundle

class Stalling(Silent):
    def bytes(self, done, total):
        print("writing", flush=True)
        time.sleep(99)

export_bundle(open_checkpoint("random:starling-tiny"), Path(sys.argv[1]), ExportOptions(), Stalling())
"""
    out = tmp_path / "bundle"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
    time.sleep(0.1)
    assert not out.exists()
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert not (left[0] / "bundle.json").exists()
    export_bundle(tiny_checkpoint, out, ExportOptions())
    assert [f.name for f in tmp_path.iterdir()] == ["bundle"]


def test_a_graph_that_disagrees_is_refused() -> None:
    good = Parity(66, 2, 1e-5, 0.0, 0.0, 1.0, 10.0, 10.0)
    require_fp32(good)
    for bad in (Parity(66, 2, 2e-3, 0.0, 0.0, 1.0, 10.0, 10.0), Parity(66, 2, 1e-5, 0.0, 0.0, 0.98, 10.0, 10.0)):
        with pytest.raises(StarlingError, match="disagrees with PyTorch"):
            require_fp32(bad)


def test_the_comparison_sees_hundreds_of_positions(demo_bundle: Path, tiny_bundle: Path) -> None:
    """128 tokens of each of four texts, in both tokenizers."""
    for bundle in (demo_bundle, tiny_bundle):
        assert manifest_of(bundle)["parity"]["positions"] == 392
