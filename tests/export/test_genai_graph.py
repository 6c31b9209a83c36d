"""The graph for onnxruntime-genai: the last token's logits, or every token's where they were asked for."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from starling.engine.errors import UserError
from starling.export.check.torch_reference import load_reference, reference_logits
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.exporter import ExportOptions, export_bundle

IDS = [1, 420, 6316, 28781, 77, 900]


def run(graph: Path, ids: list[int]) -> np.ndarray:
    """Logits of a prompt, fed as lm-eval's `onnxruntime` does: the sizes by the names of the dimensions."""
    session = ort.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    feeds = {}
    for given in session.get_inputs():
        if given.name in ("input_ids", "attention_mask"):
            feeds[given.name] = np.array([ids if given.name == "input_ids" else [1] * len(ids)])
        else:
            sizes = [1 if size == "batch" else 0 if size == "past_sequence_length" else size for size in given.shape]
            feeds[given.name] = np.zeros(sizes, np.float32)
    found: np.ndarray = session.run(["logits"], feeds)[0]
    return found


def declared(graph: Path) -> list[str | int]:
    """The shape that the graph says its logits have."""
    outputs = onnx.load(graph, load_external_data=False).graph.output
    [logits] = [output for output in outputs if output.name == "logits"]
    return [size.dim_param or size.dim_value for size in logits.type.tensor_type.shape.dim]


def test_every_tokens_logits_are_pytorchs(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    export_bundle(tiny_checkpoint, tmp_path / "all", ExportOptions(check=False, all_logits=True))
    graph = tmp_path / "all" / "model_genai.onnx"
    assert declared(graph) == ["batch", "sequence", 32002]
    expected = reference_logits(load_reference(tiny_checkpoint.config, tiny_checkpoint.tensors), IDS).numpy()
    np.testing.assert_allclose(run(graph, IDS)[0], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(run(graph, IDS[:1])[0], expected[:1], rtol=1e-4, atol=1e-4)


def test_by_default_a_prompt_costs_the_last_tokens_alone(tiny_bundle: Path, tiny_checkpoint: Checkpoint) -> None:
    graph = tiny_bundle / "model_genai.onnx"
    assert declared(graph) == ["batch", 1, 32002]
    expected = reference_logits(load_reference(tiny_checkpoint.config, tiny_checkpoint.tensors), IDS).numpy()
    found = run(graph, IDS)
    assert found.shape == (1, 1, 32002)
    np.testing.assert_allclose(found[0], expected[-1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dialect", ["tensorrt", "canonical"])
def test_other_dialects_have_no_such_graph(dialect: str) -> None:
    with pytest.raises(UserError, match=f"all_logits is for --dialect ort: {dialect} has no graph for"):
        ExportOptions(dialect=dialect, all_logits=True)
