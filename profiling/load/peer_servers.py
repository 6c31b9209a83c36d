"""`starling serve` and other runtimes' servers under the same streams, taking turns in one run.

    python -m starling.profiling.load.peer_servers BUNDLE --peers peers --output servers.json

Each round starts every server afresh and puts one load after another on them, one server at a time: the same token ids,
all streams at once, greedy, on the same number of threads. Rounds may be spread over several calls with --add.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import BackendError, UserError
from starling.engine.host import default_threads
from starling.engine.text.tokenizer import Tokenizer
from starling.profiling.load.servers.server_chart import load_chart
from starling.profiling.load.servers.server_loads import (
    KINDS,
    LONGEST,
    Load,
    PromptKind,
    loads,
    prompts_of,
    text_tokens,
)
from starling.profiling.load.servers.server_process import LLAMA_CPP, Room, Server, Stream, llama_server, server_of
from starling.profiling.load.servers.server_summary import LoadRun, LoadSummary, load_run, load_tables, summarize_loads
from starling.profiling.machine.environment import describe_environment
from starling.profiling.peers.compare import chosen
from starling.profiling.peers.contenders import Contender, our_contenders
from starling.profiling.peers.measure import SETTLE_S, WARM_UP_TOKENS, turns
from starling.profiling.peers.peers_file import read_peers
from starling.profiling.programs import failing_in_one_line, write_document
from starling.profiling.reports.profile_document import bundle_document

FORMAT, FORMAT_VERSION = "starling-peer-servers", 1
#: Peers that batch requests which come at once. The others answer one after another.
SERVING = (LLAMA_CPP, "openvino")
#: Columns that the tables take.
WIDTH = 112


@dataclass(frozen=True, slots=True)
class Plan:
    """What is put on the servers: each kind of prompts with each number of streams, in `rounds`."""

    prompts: tuple[PromptKind, ...]
    streams: tuple[int, ...]
    new_tokens: int
    threads: int
    rounds: int

    @property
    def room(self) -> Room:
        """What each server is started with: the same for all loads."""
        return Room(max(self.streams), LONGEST + self.new_tokens, self.threads)


def _streams(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    parts = value.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of numbers of streams; write for example 1,4,16")
    return tuple(dict.fromkeys(map(int, parts)))


@click.command(context_settings={"show_default": True})
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--peers", "folder", required=True, type=click.Path(path_type=Path), help="Folder of ...peers.install.")
@click.option("--only", help="Peers or contenders to take, by commas.  [default: all that serve, of our precision]")
@click.option("--streams", default="1,4,8,16", callback=_streams, help="Streams at once, by commas.")
@click.option("--prompts", type=click.Choice([*KINDS, "both"]), default="both", help="What prompts have in common.")
@click.option("--new-tokens", default=64, type=click.IntRange(2), help="Greedy tokens of an answer.")
@click.option("--threads", default=default_threads, type=click.IntRange(1), help="Threads of every server.")
@click.option("--rounds", default=3, type=click.IntRange(1), help="Times that all servers are started afresh.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="JSON file; a chart (.svg) beside it.")
@click.option("--add", is_flag=True, help="Add the rounds to those that OUTPUT has.")
def main(
    bundle: Path, folder: Path, only: str | None, prompts: str, output: Path | None, add: bool, **plan: Any
) -> None:
    """Measure throughput, TTFT and ITL of BUNDLE's server beside llama-server and OpenVINO's continuous batching.

    The peers are those of a folder that starling.profiling.peers.install made.

    \b
    Example:
      python -m starling.profiling.peers.install peers --peers llama.cpp,openvino --precisions int8
      python -m starling.profiling.load.peer_servers smollm2 --peers peers --output servers.json
    """
    with failing_in_one_line():
        kinds = KINDS if prompts == "both" else tuple(kind for kind in KINDS if kind == prompts)
        ours, wanted = Bundle.open(bundle), Plan(prompts=kinds, **plan)
        earlier = _earlier(output, ours, wanted) if add else None
        if output is not None and not output.absolute().parent.is_dir():
            raise UserError(f"{output.parent} is no folder; choose another --output")
        document = measure(ours, serving_contenders(ours, read_peers(folder), only), wanted, earlier)
    write_document(document, output)
    if output is not None:
        output.with_suffix(".svg").write_text(load_chart(document), encoding="utf-8")
    _print(document)


def serving_contenders(bundle: Bundle, peers: Sequence[Contender], only: str | None) -> list[Contender]:
    """Ours first, then the peers of its precision that batch.

    Raises UserError where there is none, or the server of one is not installed.
    """
    ours = our_contenders([bundle], "cpu")[0]
    able = [peer for peer in peers if peer.peer in SERVING and peer.precision == ours.precision]
    if not able:
        raise UserError(
            f"no peer that serves several requests together has a model in {ours.precision}; set one up: python -m "
            f"starling.profiling.peers.install FOLDER --peers {','.join(SERVING)} --precisions {ours.precision}"
        )
    for peer in (taken := chosen(able, only)):
        if peer.peer == LLAMA_CPP:
            llama_server(peer)  # known now rather than after minutes
    return [ours, *taken]


def _earlier(output: Path | None, bundle: Bundle, plan: Plan) -> dict[str, Any] | None:
    """The document that this call goes on with; None where there is none yet. Raises UserError for another's."""
    if output is None:
        raise UserError("--add adds to a file; name it with --output")
    if not output.exists():
        return None
    try:
        document: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        about, theirs = [document["format"], document["format_version"], document["bundle"]], document["plan"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{output} cannot be gone on with ({error!r}); choose another --output") from error
    if about == [FORMAT, FORMAT_VERSION, bundle_document(bundle)] and theirs == _kept(plan):
        return document
    raise UserError(f"{output} is of another bundle, --threads or --new-tokens; choose another --output")


def _kept(plan: Plan) -> dict[str, int]:
    """What all calls that write one document have in common."""
    return {"new_tokens": plan.new_tokens, "threads": plan.threads}


def measure(
    bundle: Bundle, contenders: Sequence[Contender], plan: Plan, earlier: dict[str, Any] | None
) -> dict[str, Any]:
    """All rounds, after those of an earlier call, as a JSON document. Raises BackendError where our server fails."""
    environment = asdict(describe_environment())
    runs = [LoadRun(**run) for run in earlier["runs"]] if earlier else []
    planned = {(load.prompts, load.streams) for load in loads(plan.prompts, plan.streams)}
    first = 1 + max((run.round for run in runs if (run.prompts, run.streams) in planned), default=-1)
    failures: dict[str, str] = dict(earlier["failures"]) if earlier else {}
    abouts: dict[str, Any] = {}
    tokenizer = Tokenizer.load(bundle.folder, bundle.architecture.vocab_size)
    with Console(stderr=True).status("loading") as status:
        for round_ in range(first, first + plan.rounds):
            runs += _round(contenders, plan, tokenizer, round_, abouts, failures, status.update)
    call = {
        "environment": environment,
        "prompts": plan.prompts,
        "streams": plan.streams,
        "rounds": [first, first + plan.rounds - 1],
        "servers": abouts,
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bundle": bundle_document(bundle),
        "plan": _kept(plan),
        "calls": [*(earlier["calls"] if earlier else []), call],
        "failures": failures,
        "summaries": [asdict(summary) for summary in summarize_loads(runs, contenders[0].name)],
        "runs": [asdict(run) for run in runs],
    }


def _round(
    contenders: Sequence[Contender],
    plan: Plan,
    tokenizer: Tokenizer,
    round_: int,
    abouts: dict[str, Any],
    failures: dict[str, str],
    progress: Callable[[str], None],
) -> list[LoadRun]:
    """One round over all loads. A peer that fails is named in `failures` and left out of the rest; ours must not."""
    runs: list[LoadRun] = []
    with ExitStack() as stack:
        servers: list[Server] = []
        for contender in contenders:
            progress(f"round {round_ + 1}: starting {contender.name}")
            try:
                server = stack.enter_context(server_of(contender, plan.room))
                server.answer([text_tokens(tokenizer, LONGEST, "warm-up")], WARM_UP_TOKENS)
            except BackendError as error:
                _note_failure(contender.name, contenders, error, failures)
                continue
            abouts[server.name] = dict(server.about)
            servers.append(server)
        for load in loads(plan.prompts, plan.streams):
            progress(f"round {round_ + 1}: {load.streams} streams, {load.prompts} prompts")
            answers = {}
            for server in turns(tuple(servers), round_):
                try:
                    answers[server.name] = _run(server, load, tokenizer, round_, plan.new_tokens)
                except BackendError as error:
                    _note_failure(server.name, contenders, error, failures)
                    servers.remove(server)
            texts = {name: [_text(stream, tokenizer) for stream in streams] for name, streams in answers.items()}
            ours = texts[contenders[0].name]
            runs += [load_run(name, load, round_, answers[name], texts[name], ours) for name in answers]
    return runs


def _note_failure(name: str, contenders: Sequence[Contender], error: BackendError, failures: dict[str, str]) -> None:
    if name == contenders[0].name:
        raise error
    failures[name] = str(error)


def _run(server: Server, load: Load, tokenizer: Tokenizer, round_: int, new_tokens: int) -> list[Stream]:
    prompts = prompts_of(load, tokenizer, round_)
    if prompts.known is not None:
        server.answer([prompts.known], WARM_UP_TOKENS)
    time.sleep(SETTLE_S)
    streams = server.answer(prompts.streams, new_tokens)
    for stream in streams:
        if stream.count != new_tokens or not stream.arrivals_ms:
            raise BackendError(f"{server.name}: gave {stream.count} tokens instead of {new_tokens}")
    return streams


def _text(stream: Stream, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(stream.ids or []) if stream.text is None else stream.text


def _print(document: dict[str, Any]) -> None:
    console = Console(width=max(Console().width, WIDTH))
    about, plan = document["calls"][-1]["environment"], document["plan"]
    name = document["bundle"]["source"]["name"]
    console.print(
        f"{name} on {about['machine']['cpu']}, {plan['threads']} threads, {plan['new_tokens']} new tokens",
        soft_wrap=True,
        highlight=False,
    )
    for table in load_tables([LoadSummary(**row) for row in document["summaries"]]):
        console.print(table, "")
    console.print("Medians of all rounds; ratios are ours / theirs, the median over the rounds: above 1 is our gain in")
    console.print("tok/s, below 1 in TTFT and ITL. Alike: the share of an answer up to the first character that is not")
    console.print("ours. OpenVINO is driven in its process, without HTTP.")
    for name, line in document["failures"].items():
        console.print(f"No figures of {name}: {line}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
