"""`starling build`: from a bundle to a TensorRT engine plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from starling.cli.shared.next_commands import after_build
from starling.cli.shared.options import Choice, bundle_argument, json_option, max_batch_option, renamed_option
from starling.cli.shared.output import human_bytes, human_seconds, print_json
from starling.cli.shared.progress_bar import progress_on_stderr

# Spelt out here, since importing it from starling.engine would bring numpy into `--help`; a test compares the two.
RUNTIMES = ("tensorrt-rtx", "tensorrt")


@click.command()
@bundle_argument
@click.option("--runtime", type=Choice(RUNTIMES), help="What builds and runs it.  [default: what is installed]")
@click.option("--target", metavar="SM[,SM…]", help="GPUs to build for, such as sm89,sm120.  [default: the one here]")
@max_batch_option(1, "Requests that run together, at most: rows of the KV cache.")
@click.option(
    "--max-prefill", type=click.IntRange(1), help="Tokens of one prefill at most.  [default: 1024 or --max-seq]"
)
@click.option(
    "--max-seq", type=click.IntRange(1), help="Positions of the KV cache, at most.  [default: 2048 or the model's]"
)
@renamed_option("--engine", "--name", help="Name of the new engine.  [default: runtime, version and targets]")
@click.option("--greedy", is_flag=True, help="Without the drawing of tokens, which each step pays for; the host draws.")
@click.option("--verify", is_flag=True, help="Check the weights' SHA-256 first (seconds per GB).")
@click.option("--force", is_flag=True, help="Replace the engine of that name.")
@json_option
def command(bundle: Path, target: str | None, engine: str | None, verify: bool, as_json: bool, **options: Any) -> None:
    """Build a TensorRT engine plan of BUNDLE into BUNDLE/engines, where it appears whole or not at all.

    BUNDLE is one of `starling export … --dialect tensorrt`. TensorRT for RTX builds on any machine, also without a GPU,
    for GeForce and RTX cards; TensorRT builds on the machine that will run the plan.

    \b
    Examples:
      starling build smollm2-trt --target sm89
      starling build smollm2-trt --target sm89,sm120 --max-batch 8 --max-seq 4096
      starling build smollm2-trt --runtime tensorrt --engine production
      starling inspect smollm2-trt --engine production
    """
    from starling.engine.backends.tensorrt.build.builder import BuildOptions, build_engine
    from starling.engine.bundle.manifest import Bundle

    opened = Bundle.open(bundle, verify=verify)
    targets = tuple(filter(None, (target or "").split(",")))
    with progress_on_stderr(lines=True) as progress:
        record = build_engine(opened, BuildOptions(targets=targets, name=engine, **options), progress)
    if as_json:
        print_json({"name": record.name, "file": str(record.plan_path), **record.to_json()})
        return
    name, layers = click.style(str(record.plan_path), bold=True), record.layers
    click.echo(
        f"{name}: {human_bytes(record.plan.bytes)}, {record.dtype}, for {', '.join(record.targets)}, "
        f"{human_seconds(record.build_seconds)}"
    )
    click.echo(
        f"up to {record.max_batch} x {record.max_seq} positions, prefills of {record.max_prefill}; "
        f"{layers.get('ATTENTION_INPUT', 0)} attentions, {layers.get('KV_CACHE_UPDATE', 0)} KV cache updates in place"
    )
    click.echo(after_build(opened, record))
