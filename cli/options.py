"""Options that several commands share, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from starling.engine.sampling import SamplingParams

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]

# Spelt out here, since importing starling.engine.backend would bring numpy into `--help`; a test compares the two.
BACKENDS = ("auto", "onnxruntime", "onnxruntime-cpu", "onnxruntime-cuda", "tensorrt", "tensorrt-rtx")

bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")

_BACKEND = [
    click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True, help="What runs it."),
    click.option("--engine", help="TensorRT engine of the bundle by name.  [default: the smallest that fits]"),
    click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: the physical cores]"),
]
_VERIFY = [click.option("--verify", is_flag=True, help="Check the weights' SHA-256 first (seconds per GB).")]
_MAX_SEQ = [
    click.option(
        "--max-seq", type=int, help="Positions of the KV cache: prompt + answer.  [default: 2048 or the model's]"
    )
]
_SAMPLING = [
    click.option("--max-tokens", type=int, default=256, show_default=True, help="The most tokens to generate."),
    click.option(
        "--temperature",
        type=float,
        default=0.0,
        show_default=True,
        help="0 takes the likeliest token (greedy); above, tokens are drawn.",
    ),
    click.option("--top-k", type=int, default=0, show_default=True, help="Draw among the k likeliest; 0 among all."),
    click.option(
        "--top-p", type=float, default=1.0, show_default=True, help="Draw among the likeliest that make up p."
    ),
    click.option(
        "--min-p", type=float, default=0.0, show_default=True, help="Draw among those at least p times the likeliest."
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        default=1.0,
        show_default=True,
        help="Above 1 makes what was said less likely.",
    ),
    click.option("--seed", type=int, help="Makes draws repeatable.  [default: a fresh one]"),
    click.option("--stop", multiple=True, help="End before this string; repeatable. $'\\n' is a line end in bash."),
    click.option("--ignore-eos", is_flag=True, help="Go on behind the model's end token."),
]
_SPECULATION = [
    click.option(
        "--speculation",
        type=click.Choice(("off", "prompt-lookup")),
        default="off",
        show_default=True,
        callback=lambda context, option, value: None if value == "off" else value,
        help="Draft tokens from what the text said before, and verify several at a time: the same answer, sooner where "
        "it repeats the prompt. For one prompt at a time.",
    )
]
_SERVING = [
    click.option("--slots", type=click.IntRange(1), default=4, show_default=True, help="Requests that run together."),
    click.option("--queue", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait."),
    click.option(
        "--prefill-chunk",
        type=click.IntRange(1),
        default=128,
        show_default=True,
        help="Prompt tokens prefilled between two steps of the requests that run.",
    ),
]


def _stack(options: list[Decorator]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        return reduce(lambda inner, option: option(inner), reversed(options), function)

    return decorate


backend_options = _stack(_BACKEND)
engine_options = _stack([*_MAX_SEQ, *_BACKEND, *_VERIFY])
max_seq_option = _MAX_SEQ[0]
verify_option = _VERIFY[0]
speculation_option = _SPECULATION[0]
sampling_options = _stack(_SAMPLING)
serving_options = _stack(_SERVING)

_SAMPLING_NAMES = (
    "max_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
)
_ENGINE_NAMES = ("max_seq", "backend", "engine", "threads", "verify")


def sampling_params(values: Mapping[str, Any], logprobs: int | None = None) -> SamplingParams:
    """The SamplingParams of a command's options. Raises SamplingError for an impossible value."""
    from starling.engine.sampling import SamplingParams

    return SamplingParams(**{name: values[name] for name in _SAMPLING_NAMES}, logprobs=logprobs)


def engine_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for Engine of a command's options."""
    return {name: values[name] for name in _ENGINE_NAMES}
