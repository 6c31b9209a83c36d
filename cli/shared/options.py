"""Options that several commands share, and what they become."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource

from starling.cli.shared.completion import BundlePath, complete_engine
from starling.cli.shared.output import note
from starling.engine.errors import UserError, did_you_mean
from starling.engine.names import BACKENDS, DTYPES, GPU_BACKENDS, SPECULATIONS

if TYPE_CHECKING:
    from starling.engine.generation.sampling_params import SamplingParams
    from starling.engine.text.grammar import GrammarSpec

    _Choice = click.Choice[str]
else:
    _Choice = click.Choice

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]


class Choice(_Choice):
    """One of several words; the refusal of another one names the nearest."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word; a usage error for any other."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            near = did_you_mean(str(value), map(str, self.choices))
            raise click.BadParameter(f"{error.message.rstrip('.')}{near}", ctx, param) from None


def renamed_option(name: str, *old_names: str, **attributes: Any) -> Decorator:
    """`click.option(name, …)` that is also accepted under `old_names`, which `--help` does not show.

    Two of the names with different values are a usage error.
    """

    def remember(context: click.Context, option: click.Parameter, value: Any) -> None:
        if value is not None:
            context.meta.setdefault(name, {})[option.opts[0]] = value

    def decide(context: click.Context, option: click.Parameter, value: Any) -> Any:
        given = dict(context.meta.get(name, {}))
        if context.get_parameter_source(str(option.name)) is ParameterSource.COMMANDLINE:
            given[name] = value
        if len(set(given.values())) > 1:
            both = " and ".join(f"{used} {chosen}" for used, chosen in given.items())
            raise click.UsageError(f"{both} are one setting under two names: give {name} alone", context)
        return next(iter(given.values()), value)

    # Eager, so that all that was said under an old name is known when the option itself is looked at.
    hidden: dict[str, Any] = {"type": attributes.get("type"), "hidden": True, "is_eager": True, "expose_value": False}
    aliases = [click.option(old, callback=remember, **hidden) for old in old_names]
    return _stack([click.option(name, callback=decide, **attributes), *aliases])


def _stack(options: list[Decorator]) -> Callable[[Function], Function]:
    def decorate(function: Function) -> Function:
        return reduce(lambda inner, option: option(inner), reversed(options), function)

    return decorate


def max_batch_option(default: int, text: str, *old_names: str) -> Decorator:
    """`--max-batch`: rows of the KV cache."""
    kind = click.IntRange(1)
    return renamed_option("--max-batch", *old_names, type=kind, default=default, show_default=True, help=text)


def max_queue_option(default: int) -> Decorator:
    """`--max-queue`: requests that wait for a row."""
    names = ("--max-queue", "--queue", "--queue-limit")
    text = "Requests that may wait for a row; more are refused."
    return renamed_option(*names, type=click.IntRange(0), default=default, show_default=True, help=text)


bundle_argument = click.argument("bundle", type=BundlePath(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")

_BACKEND = [
    click.option("--backend", type=Choice(BACKENDS), default="auto", show_default=True, help="What runs it."),
    click.option(
        "--engine",
        shell_complete=complete_engine,
        help="TensorRT engine of the bundle by name.  [default: the smallest that fits]",
    ),
    click.option(
        "--threads", type=click.IntRange(1), help="Threads, where a CPU runs it.  [default: the physical cores]"
    ),
]
kv_dtype_option = click.option(
    "--kv-dtype",
    type=Choice(DTYPES),
    help="Type of keys and values in the cache, where the CPU kernels run it: fp16 and bf16 take half of fp32's memory "
    "and time to read.  [default: the bundle's]",
)
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
    click.option(
        "--presence-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="Above 0 makes what the answer has already less likely; -2 to 2.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        default=0.0,
        show_default=True,
        help="The same for each time that the answer has it.",
    ),
    click.option("--bad-words", multiple=True, help="Text that must not appear in the answer; repeatable."),
    click.option(
        "--min-tokens", type=int, default=0, show_default=True, help="Tokens before one that ends the answer."
    ),
    click.option("--seed", type=int, help="Makes draws repeatable.  [default: a fresh one]"),
    click.option("--stop", multiple=True, help="End before this string; repeatable. $'\\n' is a line end in bash."),
    click.option("--ignore-eos", is_flag=True, help="Go on after the model's end token."),
]
_SPECULATION = [
    click.option(
        "--speculation",
        # A draft model is named by --draft.
        type=Choice(("off", *(name for name in SPECULATIONS if name != "draft-model"))),
        default="off",
        show_default=True,
        callback=lambda context, option, value: None if value == "off" else value,
        help="Draft tokens from what the text said before, and verify several at a time: the same answer, sooner where "
        "it repeats the prompt. Several rows draft where the CPU kernels run the bundle, elsewhere one that is alone.",
    )
]
_PREFILL_CHUNK = click.option(
    "--prefill-chunk",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Prompt tokens prefilled between two steps of the requests that run, at most.",
)


def _bytes(context: click.Context, option: click.Parameter, value: str) -> int:
    """A size with or without a unit, in bytes; a usage error for anything else."""
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?) ?([KMGT]?)(I?)B?", value.strip().upper())
    if found is None:
        raise click.BadParameter(f"{value!r} is no size: give for example 512MiB, 2GB, or 0", context, option)
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix or " "))


prefix_cache_option = click.option(
    "--prefix-cache",
    metavar="SIZE",
    default="256MiB",
    show_default=True,
    callback=_bytes,
    help="Memory for known prefixes of prompts, where the backend copies rows (a CPU): 512MiB, 2GB; 0 keeps none.",
)
_REQUESTS = max_batch_option(4, "Requests that run together: rows of the KV cache.", "--slots")

backend_options = _stack(_BACKEND)
engine_options = _stack([*_MAX_SEQ, *_BACKEND, kv_dtype_option, *_VERIFY])
scoring_options = _stack([*_MAX_SEQ, *_BACKEND, *_VERIFY])
max_seq_option = _MAX_SEQ[0]
verify_option = _VERIFY[0]
speculation_option = _SPECULATION[0]
draft_option = click.option(
    "--draft",
    type=BundlePath(path_type=Path),
    help="Bundle of a smaller model of the same tokenizer, which drafts tokens for BUNDLE to verify: the same answer, "
    "sooner where it is often right and much quicker.",
)
sampling_options = _stack(_SAMPLING)
serving_options = _stack([_REQUESTS, max_queue_option(64), _PREFILL_CHUNK, prefix_cache_option])
#: `serving_options` without the queue: a batch reads its file as fast as rows become free.
offline_options = _stack([_REQUESTS, _PREFILL_CHUNK, prefix_cache_option])

#: Names of the options in `_SAMPLING`, which are those of `SamplingParams`.
SAMPLING_NAMES = tuple(str(option.name) for option in click.command()(sampling_options(lambda: None)).params)
_DRAWING_NAMES = ("top_k", "top_p", "min_p", "seed")
_ENGINE_NAMES = ("max_seq", "backend", "engine", "threads", "kv_dtype", "verify")


def given_options(names: Iterable[str]) -> list[str]:
    """Those of the running command's options that the command line has, as they are written there."""
    context = click.get_current_context()
    options = {option.name: option for option in context.command.params}
    found = []
    for name in names:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = options[name]
            off = context.params.get(name) is False and option.secondary_opts
            found.append(option.secondary_opts[0] if off else option.opts[0])
    return found


def refuse_options(names: Iterable[str], why: str) -> None:
    """Raise UserError for the first of these options that was given: `--NAME why`."""
    for option in given_options(names):
        raise UserError(f"{option} {why}")


def sampling_params(
    values: Mapping[str, Any], logprobs: int | None = None, grammar: GrammarSpec | None = None
) -> SamplingParams:
    """The SamplingParams of a command's options. Raises SamplingError for an impossible value."""
    from starling.engine.generation.sampling_params import SamplingParams

    params = SamplingParams(**{name: values[name] for name in SAMPLING_NAMES}, logprobs=logprobs, grammar=grammar)
    if params.temperature == 0 and (idle := given_options(_DRAWING_NAMES)):
        verb = "changes" if len(idle) == 1 else "change"
        note(f"{', '.join(idle)} {verb} nothing at temperature 0 (greedy): add for example --temperature 0.8")
    return params


def speculation_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for Engine of --speculation and --draft. Raises UserError where both are given."""
    if values["draft"] is not None and values["speculation"] is not None:
        raise UserError("--draft and --speculation are both given: tokens are drafted in one way, so choose one")
    draft = values["draft"]
    return {"speculation": values["speculation"], "draft": None if draft is None else str(draft.resolve())}


def engine_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for Engine of a command's options. Raises UserError as `check_backend` does."""
    check_backend(values)
    return {name: values[name] for name in _ENGINE_NAMES if name in values}


def check_backend(values: Mapping[str, Any]) -> None:
    """Raise UserError where --threads or --engine means nothing to the --backend that was chosen."""
    backend = values["backend"]
    if values["threads"] is not None and backend in GPU_BACKENDS:
        raise UserError(f"--threads is for a CPU, but --backend {backend} runs on a GPU: leave --threads out")
    if values["engine"] is not None and backend.startswith("onnxruntime"):
        raise UserError(
            f"--engine names a TensorRT engine, which --backend {backend} does not run: use --backend tensorrt-rtx"
        )
