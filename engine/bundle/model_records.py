"""What bundle.json says of the model: its shape, how it is quantized, its special tokens, and how a text is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from starling.engine.bundle.json_fields import JsonFields
from starling.engine.names import Task

ReadAt = Literal["last", "last_but_pad", "before_first_pad", "mean"]
Side = Literal["left", "right"]

#: The greatest sizes of a decoder: some way above every one that there is.
MOST_OF_ARCHITECTURE = {
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "layers": 2**12,
    "query_heads": 2**14,
    "kv_heads": 2**14,
    "head_dim": 2**14,
    "max_positions": 2**30,
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """Shape of the decoder.

    `sliding_window` is the checkpoint's own, in tokens (None: it has none); `max_positions` the longest sequence that
    the rotary tables cover; `parameters` counts tied weights once.
    """

    model_type: str
    class_name: str
    vocab_size: int
    hidden_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    sliding_window: int | None
    max_positions: int
    parameters: int
    tied_embeddings: bool


def read_architecture(fields: JsonFields) -> Architecture:
    counts = {name: fields.count(name, 1, most) for name, most in MOST_OF_ARCHITECTURE.items()}
    return Architecture(
        model_type=fields.get("model_type", str),
        class_name=fields.get("class", str),
        sliding_window=fields.optional("sliding_window", int),
        parameters=fields.get("parameters", int),
        tied_embeddings=fields.get("tied_embeddings", bool),
        **counts,
    )


@dataclass(frozen=True, slots=True)
class Quantization:
    """How weights, and in some schemes activations, are quantized.

    `block_size` weights along the input axis share a scale (None: all of an output channel); `accuracy_level` is
    MatMulNBits' own. `smoothing` is SmoothQuant's alpha; `kept` names projections that stay in the bundle's dtype.
    `bits_per_weight` is the mean over all weights in blocks, scales and zero points among them. `text`, `tokens`: what
    it was calibrated on, and how much of it.
    """

    scheme: str
    block_size: int | None
    symmetric: bool
    accuracy_level: int | None
    smoothing: float | None = None
    kept: tuple[str, ...] = ()
    bits_per_weight: float | None = None
    text: str | None = None
    tokens: int | None = None


def read_quantization(fields: JsonFields) -> Quantization:
    calibration = None if fields.value.get("calibration") is None else fields.inside("calibration")
    return Quantization(
        fields.get("scheme", str),
        fields.optional("block_size", int),
        fields.get("symmetric", bool),
        fields.optional("accuracy_level", int),
        fields.optional("smoothing", float),
        tuple(fields.optional("kept", list) or ()),
        fields.optional("bits_per_weight", float),
        calibration.get("text", str) if calibration is not None else None,
        calibration.get("tokens", int) if calibration is not None else None,
    )


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids. Generation ends at any of `eos`."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None


def read_tokens(fields: JsonFields) -> SpecialTokens:
    eos = fields.get("eos", list)
    if not all(type(token) is int and token >= 0 for token in eos):
        raise fields.bad("tokens.eos", eos, "a list of token ids")
    return SpecialTokens(fields.optional("bos", int), tuple(eos), fields.optional("pad", int))


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a model that scores or embeds reads a text: which token's hidden state, and what is done to a long text.

    `labels` are the names of the scores, in their order; none where the task is "embed". `read_at`: "last" token,
    "last_but_pad" (the last that is not `pad`: what is after it is not read), "before_first_pad" (the last before the
    first `pad`, where that is not the first token), or "mean" (over all tokens). `max_length`: a longer text loses
    tokens at its `truncation_side` (None: it is refused). `problem_type` is transformers' word for what scores mean.
    `long_from`: texts of more tokens are rotated by other factors, and so never run beside shorter ones (None: all
    alike). `normalize`: whether /v1/embeddings gives vectors of length 1 unless a request says otherwise.
    """

    labels: tuple[str, ...] = ()
    read_at: ReadAt = "last"
    pad: int | None = None
    truncation_side: Side = "right"
    max_length: int | None = None
    problem_type: str | None = None
    long_from: int | None = None
    normalize: bool = True


def read_pooling(fields: JsonFields, task: Task) -> Pooling:
    labels = fields.get("labels", list)
    if not all(isinstance(label, str) for label in labels) or (task == "score") != bool(labels):
        raise fields.bad("pooling.labels", labels, "a list with a name for each score")
    length = fields.optional("max_length", int)
    if length is not None and length < 2:  # a first token that is kept, and one of the text
        raise fields.bad("pooling.max_length", length, "a number from 2")
    read_at = cast(ReadAt, fields.choice("read_at", get_args(ReadAt)))
    if read_at == "mean" and task != "embed":
        raise fields.bad("pooling.read_at", read_at, "a token, since a score is read at one")
    return Pooling(
        tuple(labels),
        read_at,
        fields.optional("pad", int),
        cast(Side, fields.choice("truncation_side", get_args(Side))),
        length,
        fields.optional("problem_type", str),
        fields.optional("long_from", int),
        fields.optional("normalize", bool) is not False,
    )
