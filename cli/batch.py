"""`starling batch`: a file of prompts to a file of results, each exactly once."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from starling.cli.shared.options import (
    SAMPLING_NAMES,
    bundle_argument,
    draft_option,
    engine_options,
    engine_settings,
    given_options,
    offline_options,
    refuse_options,
    sampling_options,
    speculation_option,
    speculation_settings,
)
from starling.cli.shared.output import human_seconds, note
from starling.cli.shared.progress_bar import progress_on_stderr
from starling.engine.errors import UserError

if TYPE_CHECKING:
    from starling.serving.batch.input_lines import BadLine, Entry, EntryReader
    from starling.serving.batch.input_source import Source
    from starling.serving.batch.journal import Journal
    from starling.serving.batch.runner import Record


@click.command()
@bundle_argument
@click.argument("source", metavar="INPUT.jsonl", type=click.Path())
@click.argument("output", metavar="OUTPUT.jsonl", type=click.Path(path_type=Path))
@click.option("--skip-bad", is_flag=True, help="Leave lines out that are no request, in place of stopping.")
@click.option(
    "--ray",
    "ray_address",
    metavar="[ADDRESS]",
    is_flag=False,
    flag_value="auto",
    help="Run on a Ray cluster; without an address on this machine's, or that of $RAY_ADDRESS.",
)
@click.option("--ray-workers", type=click.IntRange(1), default=1, show_default=True, help="--ray: engines on it.")
@click.option("--ray-gpus", type=click.FloatRange(0), default=0, show_default=True, help="--ray: GPUs of each engine.")
@sampling_options
@offline_options
@click.option("--max-queue", "--queue", "max_queue", type=click.IntRange(0), hidden=True)
@engine_options
@speculation_option
@draft_option
def command(bundle: Path, source: str, output: Path, **options: Any) -> None:
    """Answer every line of INPUT.jsonl; each result is on the disk in OUTPUT.jsonl before it counts.

    INPUT may be - for stdin, a pipe or a FIFO: what can be read only once is copied into a temporary file first (in
    TMPDIR), and answering begins at its end. OUTPUT must be a regular file, since a later run reads it again.

    A line is {"prompt": …} or {"messages": […]} with an optional "id" and sampling fields, or a line of OpenAI's batch
    format. Results come in the order of their completion. After a kill or a crash the same command goes on where it
    was: no result is lost or made twice. Sampling options are for lines that do not say otherwise.

    \b
    Examples:
      starling batch smollm2 questions.jsonl answers.jsonl
      starling batch smollm2 questions.jsonl answers.jsonl --max-batch 8 --max-tokens 64 --skip-bad
      zcat questions.jsonl.gz | starling batch smollm2 - answers.jsonl
      starling batch /shared/starling-7b questions.jsonl answers.jsonl --ray --ray-workers 8 --ray-gpus 1
    """
    from starling.serving.batch.input_lines import EntryReader
    from starling.serving.batch.input_source import open_source
    from starling.serving.batch.journal import Journal, check_output

    if options["ray_address"] is None:
        refuse_options(("ray_workers", "ray_gpus"), "is about a Ray cluster: add --ray")
    if given_options(["max_queue"]):
        note("--max-queue changes nothing here: the file is read as rows become free")
    if Path(source).resolve() == output.resolve():
        raise UserError(f"INPUT and OUTPUT are both {source}: give another OUTPUT")
    # Before a pipe is read, and OUTPUT is made: what is refused afterwards is lost, or leaves an empty file.
    check_output(output)
    engine_settings(options)
    salt, skipped = _salt(bundle), list[str]()
    reader = EntryReader({name: options[name] for name in SAMPLING_NAMES}, salt, _bad_lines(options, skipped))
    with open_source(source) as lines:
        ids = {str(entry.id) for entry in reader.read(lines)}
        if not ids:
            raise UserError(_nothing_to_do(lines, skipped))
        with Journal(output) as journal:
            journal.check_known(ids)
            already = sum(journal.has(entry) for entry in _quiet(reader).read(lines))
            # Not before all else in the file was found to be this batch's.
            if torn := len(journal.torn):
                journal.repair(entry for entry in _quiet(reader).read(lines) if not journal.has(entry))
                note(f"{output} ended in the middle of a line: {torn} bytes cut off")
            if already:
                note(f"{already} of {len(ids)} results are there already")
            if already < len(ids):
                todo = (entry for entry in _quiet(reader).read(lines) if not journal.has(entry))
                _run(bundle, todo, journal, len(ids), _bad_lines(options, skipped), options)
            note(f"{len(journal)} results in {output}" + (f", {len(skipped)} bad line(s) skipped" if skipped else ""))


def _nothing_to_do(source: Source, skipped: list[str]) -> str:
    what = f"no line of {source.name} is a request" if skipped else f"{source.name} is empty"
    return f"{what}: nothing was answered; give JSON lines, one request each"


def _run(
    bundle: Path,
    todo: Iterable[Entry],
    journal: Journal,
    total: int,
    on_bad_line: Callable[[BadLine], None],
    options: dict[str, Any],
) -> None:
    with _progress(total, len(journal)) as show, closing(_answers(bundle, todo, on_bad_line, options)) as answers:
        for records in answers:
            journal.append(records)
            show(len(journal))


def _answers(
    bundle: Path, todo: Iterable[Entry], on_bad_line: Callable[[BadLine], None], options: dict[str, Any]
) -> Generator[list[Record], None, None]:
    settings = engine_settings(options) | speculation_settings(options) | {"max_batch": options["max_batch"]}
    if options["ray_address"] is not None:
        from starling.serving.batch.ray_job import RayJob, answer_on_ray

        job = RayJob(
            bundle=str(bundle.resolve()),
            address=options["ray_address"],
            workers=options["ray_workers"],
            gpus=options["ray_gpus"],
            settings=settings,
            prefill_chunk=options["prefill_chunk"],
            prefix_cache=options["prefix_cache"],
        )
        yield from answer_on_ray(todo, job, on_bad_line)
        return
    from starling.engine.engine import Engine
    from starling.serving.batch.runner import answer

    with Engine(bundle, **settings) as engine:
        yield from answer(
            engine,
            todo,
            prefill_chunk=options["prefill_chunk"],
            prefix_cache=options["prefix_cache"],
            on_bad_line=on_bad_line,
        )


def _bad_lines(options: dict[str, Any], skipped: list[str]) -> Callable[[BadLine], None]:
    def handle(line: BadLine) -> None:
        if not options["skip_bad"]:
            raise UserError(f"{line}; mend it, or leave such lines out with --skip-bad")
        skipped.append(str(line))
        click.echo(f"skipped: {line}", err=True)

    return handle


def _quiet(reader: EntryReader) -> EntryReader:
    """The same reader for a further pass: bad lines have been reported."""
    from dataclasses import replace

    return replace(reader, on_bad_line=lambda line: None)


def _salt(bundle: Path) -> str:
    """What stands for the bundle in a result's fingerprint. Raises BundleError where there is none, UserError where it
    generates no text."""
    from starling.engine.bundle.manifest import Bundle

    Bundle.open(bundle).require("generate")
    return hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()


@contextmanager
def _progress(total: int, already: int) -> Iterator[Callable[[int], None]]:
    """Shows how many results there are: a bar on a terminal, a line for each tenth elsewhere."""
    begin = perf_counter()
    if not sys.stderr.isatty():
        tenths = already * 10 // total

        def show_line(done: int) -> None:
            nonlocal tenths
            if done * 10 // total > tenths:
                tenths = done * 10 // total
                note(f"{done} of {total} results, {human_seconds(perf_counter() - begin)}")

        yield show_line
        return
    with progress_on_stderr() as progress:
        progress.phase("results")
        progress.steps(already, total)
        yield lambda done: progress.steps(done, total)
