"""Names that export, engine, serving and command line share: settings and their words, a graph's inputs and outputs.

It imports nothing of Starling and nothing heavy, so that `starling --help` can read it.
"""

from typing import Literal, get_args

#: What runs a bundle.
BACKENDS = ("auto", "onnxruntime", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")
#: Those that run on a GPU only.
GPU_BACKENDS = ("onnxruntime-cuda", "tensorrt", "tensorrt-rtx")

Task = Literal["generate", "score", "embed"]
#: What a bundle's model gives: next tokens, scores of a text (one for each label), or a text's hidden state.
TASKS: tuple[Task, ...] = get_args(Task)

Dialect = Literal["ort", "canonical", "tensorrt"]
#: Operators of a graph.
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)
#: The quantization schemes that each dialect has operators for.
SCHEMES_OF: dict[str, tuple[str, ...]] = {
    "ort": ("int8", "int4"),
    "canonical": (),
    "tensorrt": ("int8", "int4", "w8a8", "fp8"),
}
#: All quantization schemes, and those that quantize activations too.
SCHEMES = SCHEMES_OF["tensorrt"]
ACTIVATION_SCHEMES = ("w8a8", "fp8")

DType = Literal["fp32", "fp16", "bf16"]
#: Types in which a bundle computes.
DTYPES: tuple[DType, ...] = get_args(DType)
#: What NumPy and the manifest call them.
ARRAY_DTYPES: dict[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
#: Types in which logits are kept in a file.
LOGITS_DTYPES = ("float16", "float32")

#: Where drafts come from.
Speculation = Literal["prompt-lookup", "draft-model"]
SPECULATIONS: tuple[Speculation, ...] = get_args(Speculation)

#: Positions of the KV cache unless the caller asks for more: the cache costs memory whether it is used or not.
DEFAULT_MAX_SEQ = 2048

#: int64 [batch, sequence]: the step's new tokens.
INPUT_IDS = "input_ids"
#: [batch, kept, vocab], after the positions kept.
LOGITS = "logits"
#: float32 [batch, kept, labels] and [batch, kept, hidden], of bundles that score or embed: after the positions kept.
SCORES, EMBEDDINGS = "scores", "embeddings"
#: The KV cache before and after the step, [batch, kv_heads, cache, head_dim]: `past_key_values.LAYER.key` or `.value`.
PAST, PRESENT = "past_key_values.", "present."
#: int64 [batch, sequence], dialect canonical.
POSITION_IDS = "position_ids"
#: int32 [batch], dialect ort: valid positions of each row after the step, minus one.
SEQLENS_K = "seqlens_k"
#: int32 [], dialect ort: the longest row's valid positions after the step.
TOTAL_SEQUENCE_LENGTH = "total_sequence_length"
#: int64 [kept], dialect ort: positions among the step's new tokens whose logits are computed; -1 is the last one.
LOGITS_TO_KEEP = "logits_to_keep"
#: int64 [batch, kept], or [batch, 1]: the next token after each position kept, chosen in the graph.
NEXT_TOKENS = "next_tokens"
#: int64 [batch]: valid positions of each row after the step; the next step's `past_lengths`.
NEXT_LENGTHS = "next_lengths"
#: int32 [batch]: the next step's `seqlens_k`, in the graph for CUDA.
NEXT_SEQLENS = "next_seqlens_k"
#: int64 [batch]: valid positions of each row before the step.
PAST_LENGTHS = "past_lengths"
#: float32 [batch].
TEMPERATURE = "temperature"
#: int64 [batch]: 1 takes the likeliest token, 0 is off.
TOP_K = "top_k"
#: float32 [batch].
TOP_P = "top_p"
#: float32 [batch]: as likely as this, beside the likeliest, a token must be; of the engine's own sampling on CUDA.
MIN_P = "min_p"
#: float32 [batch, cache], uniform in [0, 1): the step whose last written position is p chooses with noise[:, p].
NOISE = "noise"
#: The most tokens of a row that a choice in the graph draws from.
TOP_K_LIMIT = 256

#: The folder of a bundle or a checkpoint that holds further chat templates.
EXTRA_TEMPLATES = "additional_chat_templates"
