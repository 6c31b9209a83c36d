"""What the shell is offered where an argument or an option wants more than one of a few words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem

from starling.export.checkpoints.random_models import RANDOM_MODELS, RANDOM_PREFIX

if TYPE_CHECKING:
    Item = CompletionItem[str]

#: What `export` knows by a name of its own.
MODELS = ("demo", *(f"{RANDOM_PREFIX}{name}" for name in RANDOM_MODELS))


class BundlePath(click.Path):
    """A path that the shell completes with folders."""

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
        """The shell's own completion of folders."""
        return [CompletionItem(incomplete, type="dir")]


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    """For MODEL of `export`: the names that it knows, and files and folders."""
    names = [CompletionItem(name) for name in MODELS if name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


def complete_engine(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Item]:
    """The engines of the bundle that stands on the line already."""
    # An option without its value ends the parsing: the arguments before it are not taken apart yet.
    bundle = ctx.params.get("bundle") or next(iter(ctx.args), None)
    names = () if bundle is None else sorted(file.stem for file in Path(bundle, "engines").glob("*.json"))
    return [CompletionItem(name) for name in names if name.startswith(incomplete) and not name.startswith(".")]
