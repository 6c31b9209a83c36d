"""What lets the unmodified onnxruntime-genai run a bundle: its configuration, and a graph that takes a mask.

onnxruntime-genai feeds `attention_mask` [batch, total]; GroupQueryAttention wants lengths. The second graph computes
them from the mask and shares the weights of the first.
"""

from typing import Any

import onnx_ir as ir

from starling.engine.bundle.model_records import Architecture
from starling.engine.names import (
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    NEXT_TOKENS,
    PAST,
    PRESENT,
    SEQLENS_K,
    TOTAL_SEQUENCE_LENGTH,
)
from starling.export.checkpoints.checkpoint import Checkpoint
from starling.export.graphs.rewrites import insert

GRAPH_FILE = "model_genai.onnx"
# Its generic decoder-only kind: what the type changes beyond that is the processing of images and sound.
MODEL_TYPE = "decoder"


def genai_graph(model: ir.Model, *, all_logits: bool = False) -> ir.Model:
    """A copy of an `ort` graph with `attention_mask` in place of the two lengths, and the last token's logits alone.

    With `all_logits` those of every token: [batch, sequence, vocab] of a prompt are in memory at once.
    """
    twin = model.clone()
    graph = twin.graph
    by_name = {value.name: value for value in graph.inputs}
    mask = ir.val("attention_mask", ir.DataType.INT64, ["batch", "total"])
    graph.inputs.insert(1, mask)
    first = next(iter(graph))
    axis = insert(graph, first, ir.node("Constant", [], attributes={"value_ints": [1]}))
    count = insert(graph, first, ir.node("ReduceSum", [mask, axis], attributes={"keepdims": 0}))
    lengths = insert(graph, first, ir.node("Sub", [count, axis]))
    seqlens = insert(graph, first, ir.node("Cast", [lengths], attributes={"to": ir.DataType.INT32}))
    shape = insert(graph, first, ir.node("Shape", [mask], attributes={"start": 1}))
    scalar = insert(graph, first, ir.node("Squeeze", [shape]))
    total = insert(graph, first, ir.node("Cast", [scalar], attributes={"to": ir.DataType.INT32}))
    for choice in [output for output in graph.outputs if output.name == NEXT_TOKENS]:
        graph.outputs.remove(choice)
        graph.remove(choice.producer(), safe=True)  # type: ignore[arg-type]
    for name, value in ((SEQLENS_K, seqlens), (TOTAL_SEQUENCE_LENGTH, total)):
        ir.convenience.replace_all_uses_with(by_name[name], value)
        graph.inputs.remove(by_name[name])
    kept: int | ir.SymbolicDim = 1
    if all_logits:
        _keep_all(by_name[LOGITS_TO_KEEP])
        kept = ir.SymbolicDim("sequence")
    else:
        last = insert(graph, first, ir.node("Constant", [], attributes={"value_ints": [-1]}))
        ir.convenience.replace_all_uses_with(by_name[LOGITS_TO_KEEP], last)
    graph.inputs.remove(by_name[LOGITS_TO_KEEP])
    logits = next(output for output in graph.outputs if output.name == LOGITS)
    assert logits.shape is not None
    logits.shape = ir.Shape([logits.shape[0], kept, logits.shape[2]])  # by which genai knows how many it gets
    _name_past(twin)
    return twin


def _keep_all(kept: ir.Value) -> None:
    """Take out what gathers the positions `kept`."""
    [use] = kept.uses()
    gather = use.node
    ir.convenience.replace_all_uses_with(gather.outputs[0], gather.inputs[0])  # type: ignore[arg-type]
    assert gather.graph is not None
    gather.graph.remove(gather, safe=True)


def _name_past(model: ir.Model) -> None:
    """Name the cache's length as other exporters do: lm-eval knows by it that it may begin with an empty one."""
    for values, prefix, name in (
        (model.graph.inputs, PAST, "past_sequence_length"),
        (model.graph.outputs, PRESENT, "total_sequence_length"),
    ):
        for value in values:
            if value.name is not None and value.name.startswith(prefix):
                assert value.shape is not None
                batch, heads, _, head_dim = value.shape
                value.shape = ir.Shape([batch, heads, name, head_dim])


def genai_config(arch: Architecture, checkpoint: Checkpoint) -> dict[str, Any]:
    """The contents of genai_config.json; greedy unless the checkpoint's own defaults sample."""
    tokenizer, generation = checkpoint.tokenizer, checkpoint.generation
    eos = list(tokenizer.eos)
    search = {
        "do_sample": bool(generation.get("do_sample", False)),
        "max_length": arch.max_positions,
        "past_present_share_buffer": True,
        "repetition_penalty": float(generation.get("repetition_penalty") or 1.0),
        "temperature": float(generation.get("temperature") or 1.0),
        "top_k": int(generation.get("top_k") or 50),
        "top_p": float(generation.get("top_p") or 1.0),
    }
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH_FILE,
        "head_size": arch.head_dim,
        "hidden_size": arch.hidden_size,
        "inputs": {
            "input_ids": INPUT_IDS,
            "attention_mask": "attention_mask",
            "past_key_names": f"{PAST}%d.key",
            "past_value_names": f"{PAST}%d.value",
        },
        "outputs": {
            "logits": LOGITS,
            "present_key_names": f"{PRESENT}%d.key",
            "present_value_names": f"{PRESENT}%d.value",
        },
        "num_attention_heads": arch.query_heads,
        "num_hidden_layers": arch.layers,
        "num_key_value_heads": arch.kv_heads,
    }
    model: dict[str, Any] = {
        "type": MODEL_TYPE,
        "context_length": arch.max_positions,
        "vocab_size": arch.vocab_size,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": tokenizer.pad if tokenizer.pad is not None else (eos or [0])[0],
        "decoder": decoder,
    }
    if tokenizer.bos is not None:
        model["bos_token_id"] = tokenizer.bos
    return {"model": model, "search": search}
