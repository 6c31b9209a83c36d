"""`python -m starling.profiling.peers.install`: the peers' environments and models, all from one checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import click

from starling.engine.errors import StarlingError, UserError
from starling.export.bundle_folder import new_bundle_folder
from starling.profiling.peers.catalogue import PEERS, Device, Peer, Recipe
from starling.profiling.peers.checkpoint_folder import GGUF, write_checkpoint
from starling.profiling.peers.contenders import Contender
from starling.profiling.peers.environments import prepare_environment, python_of, run_logged
from starling.profiling.peers.peers_file import write_peers


@click.command(context_settings={"show_default": True})
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", default="demo", help="Checkpoint, as `starling export` takes it.")
@click.option("--peers", "chosen", help="Only these, by commas.  [default: all of the device]")
@click.option("--precisions", help="Only models of these, as int8,int4.  [default: all]")
@click.option("--device", default="cpu", type=click.Choice(list(PEERS)), help="Which list of peers.")
def main(folder: Path, model: str, chosen: str | None, precisions: str | None, device: Device) -> None:
    """Set up the peers in FOLDER: an environment for each, and its models at each precision.

    What is there already is left alone, so a setup that was stopped goes on. A peer that fails is named and left out;
    the others are set up all the same.

    \b
    Examples:
      python -m starling.profiling.peers.install peers
      python -m starling.profiling.peers.install peers --peers llama.cpp,transformers
      python -m starling.profiling.peers.install peers-gpu --device cuda
    """
    try:
        failures = set_up(folder.absolute(), model, choose(device, chosen, precisions), device)
    except StarlingError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(error.exit_code)
    for failure in failures:
        click.echo(f"Error: {failure}", err=True)
    sys.exit(1 if failures else 0)


def choose(device: Device, names: str | None, precisions: str | None = None) -> list[Peer]:
    """The peers of a device, all or those named, with all recipes or those of some precisions.

    Raises UserError for a name or a precision that is not among them.
    """
    known = {peer.name: peer for peer in PEERS[device]}
    peers = [known[name] for name in _named(names, known, f"no peer on {device}")]
    if precisions is None:
        return peers
    there = list(dict.fromkeys(recipe.precision for peer in peers for recipe in peer.recipes))
    wanted = _named(precisions, there, "no precision of these peers")
    return [replace(peer, recipes=tuple(one for one in peer.recipes if one.precision in wanted)) for peer in peers]


def _named(names: str | None, known: Collection[str], mistake: str) -> list[str]:
    wanted = list(known) if names is None else list(dict.fromkeys(names.split(",")))
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(f"{unknown[0]!r} is {mistake}; there are {', '.join(known)}")
    return wanted


def set_up(folder: Path, model: str, peers: Sequence[Peer], device: Device) -> list[str]:
    """Set the peers up in `folder` and list all that are ready in it; one line for each that failed.

    Raises StarlingError where the checkpoint cannot be read or written, UserError where `folder` has another one.
    """
    _prepare_checkpoint(folder, model)
    failures = []
    for peer in peers:
        try:
            _set_up_peer(folder, peer)
        except StarlingError as error:
            failures.append(f"{peer.name}: {error}")
        # After each, so that a setup that is stopped leaves what it has.
        ready = list(ready_contenders(folder, device))
        write_peers(folder, ready)
    click.echo(f"{folder}: {len(ready)} contenders are ready: {', '.join(one.name for one in ready)}")
    return failures


def ready_contenders(folder: Path, device: Device) -> Iterator[Contender]:
    """What the folder has of the catalogue, environment and model both."""
    for peer in PEERS[device]:
        python = python_of(_environment(folder, peer))
        for recipe in peer.recipes:
            model = _model(folder, peer, recipe)
            if python.exists() and model.is_dir():
                yield Contender(
                    name=f"{peer.name} {recipe.name}",
                    peer=peer.name,
                    precision=recipe.precision,
                    python=python,
                    worker=peer.worker,
                    model=model,
                    device=device,
                    settings=recipe.settings,
                )


def _prepare_checkpoint(folder: Path, model: str) -> None:
    note = folder / "checkpoint.txt"
    if (folder / "checkpoint").is_dir() and note.is_file():
        if (there := note.read_text(encoding="utf-8").strip()) != model:
            raise UserError(f"{folder} is of the model {there!r}, not {model!r}; give another folder")
        return
    click.echo(f"writing {model} as a Hugging Face folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(model + "\n", encoding="utf-8")
    write_checkpoint(model, folder / "checkpoint")


def _set_up_peer(folder: Path, peer: Peer) -> None:
    if peer.needs_gguf and not (folder / "checkpoint" / GGUF).is_file():
        raise UserError("its models are made from a GGUF file, and the checkpoint is none")
    log = folder / "logs" / f"{peer.name}.log"
    click.echo(f"{peer.name}: environment")
    prepare_environment(peer, _environment(folder, peer), log)
    for recipe in peer.recipes:
        out = _model(folder, peer, recipe)
        if peer.maker is None or out.is_dir():
            continue
        click.echo(f"{peer.name}: model {out.name}")
        _make(folder, peer, recipe, out, log)


def _make(folder: Path, peer: Peer, recipe: Recipe, out: Path, log: Path) -> None:
    program = Path(__file__).parent / "makers" / "maker.py"
    with new_bundle_folder(out, force=False) as work:
        options = json.dumps(dict(recipe.options or {}))
        command = [str(python_of(_environment(folder, peer))), str(program), str(peer.maker)]
        # The checkpoint is at hand: nothing has to ask a hub.
        offline = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        run_logged([*command, str(folder / "checkpoint"), str(work), options], log, offline)


def _environment(folder: Path, peer: Peer) -> Path:
    return folder / "env" / peer.name


def _model(folder: Path, peer: Peer, recipe: Recipe) -> Path:
    return folder / "checkpoint" if peer.maker is None else folder / "models" / peer.name / recipe.folder


if __name__ == "__main__":
    main()
