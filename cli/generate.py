"""`starling generate`: answer one prompt, streaming, or several in a static batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from starling.cli.shared.grammar_options import grammar_of, grammar_options
from starling.cli.shared.options import (
    bundle_argument,
    draft_option,
    engine_options,
    engine_settings,
    json_option,
    sampling_options,
    speculation_option,
    speculation_settings,
)
from starling.cli.shared.options import sampling_params as params_of
from starling.cli.shared.output import note, print_json, read_text
from starling.cli.shared.result_output import batch_figures, figures, generation_json, logprob_lines, note_backend
from starling.cli.shared.streaming import print_stream
from starling.engine.errors import PromptError

if TYPE_CHECKING:
    from starling.engine.batching.generation_stream import GenerationStream
    from starling.engine.engine import Engine
    from starling.engine.generation.results import GenerationResult
    from starling.engine.generation.sampling_params import SamplingParams

INTERRUPTED = 130


@click.command()
@bundle_argument
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option("--prompt-file", type=click.Path(path_type=Path), help="Read the prompt from a UTF-8 file.")
@click.option("--ids", help="Token ids in place of text, by commas; they are taken as they are.")
@click.option("--chat/--raw", default=None, help="Use the chat template or not.  [default: where the bundle has one]")
@click.option("--system", help="System message of the chat.")
@click.option("--template", help="Chat template by name, for example code.")
@sampling_options
@grammar_options
@click.option("--logprobs", type=int, help="Show log-probabilities of each token and of the N likeliest.")
@engine_options
@speculation_option
@draft_option
@click.option("--no-stream", is_flag=True, help="Print the text when it is complete.")
@json_option
@click.pass_context
def command(context: click.Context, /, bundle: Path, no_stream: bool, as_json: bool, **options: Any) -> None:
    """Generate an answer to PROMPT (- reads stdin); several prompts run as one static batch.

    The text goes to stdout, a line of figures to stderr. Without sampling options decoding is greedy. Ctrl-C keeps the
    text so far.

    \b
    Examples:
      starling generate smollm2 "What is the capital of South Korea?"
      starling generate smollm2 --raw "The largest city in Japan is" --max-tokens 6
      starling generate smollm2 "Write a haiku." --temperature 0.8 --top-p 0.95 --seed 7
      starling generate starling-7b --template code - < task.txt
      starling generate smollm2 --speculation prompt-lookup --prompt-file edit-this-code.txt
      starling generate smollm2 "What is the capital of South Korea?" --choice Seoul --choice Busan
      starling generate smollm2 "Invent a person." --json-schema person.schema.json --temperature 0.8
      starling generate smollm2 "What is the capital of South Korea?" "What is the capital of Japan?" --json
      starling generate smollm2 --ids 504,3575,282,4649,314
    """
    prompts = _prompts(options["prompts"], options["prompt_file"], options["ids"])
    params = params_of(options, options["logprobs"], grammar_of(options))
    from starling.engine.engine import Engine

    settings = {**engine_settings(options), **speculation_settings(options)}
    with Engine(bundle, max_batch=len(prompts), **settings) as engine:
        note_backend(engine)
        chat = _wants_chat(engine, options)
        if len(prompts) == 1:
            stream = _start(engine, prompts[0], chat, options, params)
            results = [print_stream(stream, show=not (as_json or no_stream))]
        else:
            results = _run_batch(engine, prompts, chat, options, params)
        if as_json:
            print_json(generation_json(results, engine))
        else:
            _print(results, engine, streamed=len(prompts) == 1 and not no_stream)
            if options["speculation"] and engine.backend.verified_rows < len(prompts):
                note(
                    "the prompts drafted only while one was left: several rows draft where the CPU kernels run a bundle"
                )
    if any(result.finish_reason == "interrupted" for result in results):
        context.exit(INTERRUPTED)


def _prompts(arguments: Sequence[str], file: Path | None, ids: str | None) -> list[str] | list[list[int]]:
    """The prompts of the command line, each from one place. Raises PromptError where there is none."""
    texts = [read_text(None) if argument == "-" else argument for argument in arguments]
    texts += [read_text(file)] if file is not None else []
    if ids is not None:
        if texts:
            raise PromptError("--ids and a text are both given: choose one")
        return [_ids(ids)]
    if not texts:
        raise PromptError("no prompt: give a text, - to read stdin, --prompt-file or --ids")
    for text in texts:
        if not text:
            raise PromptError("the prompt is empty: give it at least one character")
    return texts


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise PromptError(f"--ids {text!r} is no list of token ids: write for example 1,420,6316") from None


def _wants_chat(engine: Engine, options: dict[str, Any]) -> bool:
    """Whether the template is used: as asked, else where there is one and the prompt is text."""
    named = [f"--{name}" for name in ("system", "template") if options[name] is not None]
    if options["chat"] is False or options["ids"] is not None:
        if named or options["chat"]:
            plain = "--ids" if options["ids"] is not None else "--raw"
            raise PromptError(f"{plain} takes no chat template, so {(named or ['--chat'])[0]} has no place: drop one")
        return False
    return bool(options["chat"] or named or engine.chat_templates.names)


def _start(
    engine: Engine, prompt: str | list[int], chat: bool, options: dict[str, Any], params: SamplingParams
) -> GenerationStream:
    if chat and isinstance(prompt, str):
        return engine.chat(options["system"], options["template"]).stream(prompt, params)
    return engine.stream(prompt, params)


def _run_batch(
    engine: Engine, prompts: list[str] | list[list[int]], chat: bool, options: dict[str, Any], params: SamplingParams
) -> list[GenerationResult]:
    if not chat:
        return _kept(lambda: engine.generate(prompts, params))
    system = [] if options["system"] is None else [{"role": "system", "content": options["system"]}]
    rendered = [
        engine.apply_chat_template([*system, {"role": "user", "content": str(text)}], options["template"])
        for text in prompts
    ]
    return _kept(lambda: engine.generate(rendered, params, reply=True))


def _kept(run: Callable[[], list[GenerationResult]]) -> list[GenerationResult]:
    """The results of `run`, or what there was of them when Ctrl-C ended it."""
    from starling.engine.generation.results import GenerationInterrupted

    try:
        return run()
    except GenerationInterrupted as interruption:
        return interruption.results


def _print(results: Sequence[GenerationResult], engine: Engine, *, streamed: bool) -> None:
    for number, result in enumerate(results, 1):
        if len(results) > 1:
            click.secho(f"[{number}/{len(results)}]", bold=True)
        if not streamed:
            click.echo(result.text, nl=not result.text.endswith("\n"))
        for line in logprob_lines(result, engine):
            click.echo(line)
    note(figures(results[0], engine) if len(results) == 1 else batch_figures(results, engine))
