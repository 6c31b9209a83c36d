"""`starling serve`: OpenAI's HTTP API over one bundle."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from starling.cli.shared.completion import BundlePath
from starling.cli.shared.options import (
    bundle_argument,
    draft_option,
    engine_options,
    engine_settings,
    serving_options,
    speculation_option,
    speculation_settings,
)
from starling.cli.shared.result_output import cache_figure, prefix_figure
from starling.engine.errors import UserError
from starling.serving.http.logs import FORMATS, LEVELS, configure_logging

if TYPE_CHECKING:
    from starling.serving.http.served import Served

LOGGER = logging.getLogger("starling.serve")


@click.command()
@bundle_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--model-name", multiple=True, help="Name of the model for clients; repeatable.  [default: the folder's]")
@click.option(
    "--reward-model",
    type=BundlePath(path_type=Path),
    help="Second bundle, which scores texts: served beside BUNDLE, under its folder's name.",
)
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Keys, one a line.  [default: $STARLING_API_KEY]")
@click.option(
    "--max-body", type=click.IntRange(1), default=2**20, show_default=True, help="Bytes of a request at most."
)
@click.option(
    "--allowed-host",
    multiple=True,
    metavar="NAME",
    help="Name in URLs that is answered beside IP addresses and localhost, *.example.com too; repeatable.  [default: "
    "the --host; any where other machines can connect]",
)
@click.option(
    "--allow-origin",
    multiple=True,
    metavar="ORIGIN",
    help="Web site whose pages may use the server, as https://app.example.com; * is any; repeatable.  [default: none]",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    default=512,
    show_default=True,
    help="Connections at the same time; further ones get 503.",
)
@click.option("--max-prompt", type=click.IntRange(1), help="Tokens of a prompt at most.  [default: as --max-seq]")
@click.option(
    "--grace",
    type=click.FloatRange(0),
    default=30,
    show_default=True,
    help="Seconds that a shutdown waits for answers.",
)
@click.option(
    "--log-level",
    type=click.Choice(LEVELS),
    default="info",
    show_default=True,
    help="Least level of what goes to stderr; info has a line for each request, debug also for /health and the like.",
)
@click.option(
    "--log-format",
    type=click.Choice(FORMATS),
    default="text",
    show_default=True,
    help="json writes one object a line.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Refuse fields of a request that nobody knows, in place of naming them in x-starling-ignored.",
)
@click.option("--isolate", is_flag=True, help="Share known prefixes among requests of the same API key alone.")
@serving_options
@engine_options
@speculation_option
@draft_option
def command(bundle: Path, **options: Any) -> None:
    """Serve BUNDLE by OpenAI's API: /v1/completions, /v1/chat/completions, /v1/models, /health, /ready, /metrics.

    Up to --max-batch requests run together, --max-queue more wait, and further ones are refused with 429. SIGTERM,
    SIGHUP or Ctrl-C takes no more requests and finishes what runs within --grace seconds; a second one ends at once.
    Each request leaves a line in the log (stderr) under the id that the response bears as x-request-id. Fields that are
    taken, refused and ignored: docs/http.md.

    Further limits: 10 s for a request's headers, 30 s for its body, 30 s for an idle connection, 60 s for a client that
    reads nothing, 10 s and 1 GiB for the chat template, 64 stop strings of 1,024 characters, 20
    alternatives of logprobs; deadline_s of a request limits its whole time.

    A bundle that scores or embeds texts (alone, or beside BUNDLE as --reward-model) is served by /classify, /pooling,
    /score, /rerank and /v1/embeddings; scores are raw ones unless a request asks for probabilities.

    A request that names no temperature is sampled at the bundle's own, else at 1, as OpenAI does; `generate` is greedy.

    \b
    Examples:
      starling serve smollm2
      starling serve smollm2 --max-batch 8 --max-seq 4096 --port 8080
      starling serve starling-7b --host 0.0.0.0 --api-key-file keys.txt --model-name starling
      curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"model": "smollm2", "prompt": "The largest city in Japan is", "max_tokens": 6}'
    """
    from starling.serving.http.api_keys import read_api_keys
    from starling.serving.http.app import make_app
    from starling.serving.http.server import listen, serve

    configure_logging(options["log_level"], options["log_format"])
    settings = {**engine_settings(options), **speculation_settings(options)}
    keys = read_api_keys(options["api_key_file"], os.environ)
    if options["isolate"] and not keys:
        raise UserError("--isolate keeps API keys apart, but there is none: add --api-key-file")
    hosts, origins = _allowed_hosts(options), _allowed_origins(options["allow_origin"])
    # Before the model is loaded: a port that is taken is known at once.
    listener = listen(options["host"], options["port"])
    from starling.cli.shared.served_models import open_served

    with listener, ExitStack() as stack:
        served = open_served(stack, bundle, settings, options)
        app = make_app(
            served, api_keys=keys, max_body=options["max_body"], allowed_hosts=hosts, allowed_origins=origins
        )
        host, port = listener.getsockname()[:2]
        serve(
            app,
            served,
            listener,
            grace_s=options["grace"],
            on_ready=lambda: _announce(served, options, host, port, with_keys=bool(keys)),
            max_connections=options["max_connections"],
            log_level=options["log_level"],
        )


def _allowed_hosts(options: dict[str, Any]) -> tuple[str, ...]:
    """The names that are answered to. A server for this machine alone has its own: else any name could be pointed at it
    from a web page. Raises UserError for a pattern that is none."""
    from starling.serving.http.host_guard import ANY, is_address

    given: tuple[str, ...] = options["allowed_host"]
    for name in given:
        if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9._-]+", name) and not is_address(name):
            raise UserError(f"--allowed-host {name!r} is no name of a host: give for example starling.example.com")
    host = options["host"]
    if given:
        return given if is_address(host) else (*given, host)
    return (host,) if _is_loopback(host) else (ANY,)


def _allowed_origins(given: tuple[str, ...]) -> tuple[str, ...]:
    for origin in given:
        if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[A-Za-z0-9._:\[\]-]+", origin):
            raise UserError(
                f"--allow-origin {origin!r} is no origin: give for example https://app.example.com, without a path"
            )
    return given


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _announce(served: Served, options: dict[str, Any], host: str, port: int, *, with_keys: bool) -> None:
    if not with_keys and not _is_loopback(host):
        LOGGER.warning(f"{host} is open to other machines and no API key is set: see --api-key-file")
    shown = f"[{host}]" if ":" in host else host
    rows = f"{options['max_batch']} requests at a time, {options['max_queue']} may wait"
    generating = served.generating
    memory = ""
    if generating is not None:
        memory = f" · {cache_figure(generating.engine)} · {prefix_figure(generating.loop)}"
    LOGGER.info(f"{' and '.join(served.models)} on http://{shown}:{port} · {rows}{memory}")
    if generating is None:
        return
    temperature = str(generating.limits.defaults["temperature"]).removesuffix(".0")
    if temperature != "0":
        LOGGER.info(
            f"requests without a temperature are sampled at {temperature}; send 0 for the greedy answers of `generate`"
        )
