"""`starling tokenize`: the exact token ids of a text or of a chat."""

from __future__ import annotations

from pathlib import Path

import click

from starling.cli.shared.options import bundle_argument, json_option
from starling.cli.shared.output import note, print_json, read_text
from starling.engine.errors import PromptError


@click.command()
@bundle_argument
@click.argument("text", required=False)
@click.option("--turn", "turns", multiple=True, metavar="ROLE=TEXT", help="A chat message: user=, assistant=, system=.")
@click.option("--template", help="Chat template by name, for example code.")
@click.option("--pieces", is_flag=True, help="Show the text of each token.")
@json_option
def command(
    bundle: Path, text: str | None, turns: tuple[str, ...], template: str | None, pieces: bool, as_json: bool
) -> None:
    """Print the token ids of TEXT (- reads stdin), or of a chat by the bundle's template.

    After a user's turn the template opens the assistant's answer. Special tokens written out in TEXT count as such, in
    a turn they stay plain text. No model is loaded.

    \b
    Examples:
      starling tokenize smollm2 "The capital of France is"
      starling tokenize smollm2 --turn user="Hello" --turn assistant="Hi" --turn user="How are you?" --json
      starling tokenize starling-7b --template code --turn user="Implement quicksort using C++" --pieces
      starling tokenize smollm2 - < prompt.txt
    """
    if (text is None) == (not turns):
        raise PromptError("give either a text (- reads stdin) or --turn ROLE=TEXT")
    if template is not None and not turns:
        raise PromptError("--template is for a chat: give the text as --turn user=TEXT")
    messages = [_message(turn) for turn in turns]
    if text is not None:
        text = read_text(None) if text == "-" else text
    from starling.engine.bundle.manifest import Bundle
    from starling.engine.text.tokenizer import Tokenizer

    opened = Bundle.open(bundle)
    tokenizer = Tokenizer.load(opened.folder, opened.architecture.vocab_size)
    if text is None:
        from starling.engine.text.chat_template import ChatTemplates

        answer_follows = messages[-1]["role"] == "user"
        templates = ChatTemplates.load(opened.folder)
        ids = templates.encode(messages, tokenizer, name=template, add_generation_prompt=answer_follows)
    else:
        ids = tokenizer.encode(text)
    _print(ids, [tokenizer.id_to_token(token) or "" for token in ids] if pieces else None, as_json)


def _message(turn: str) -> dict[str, str]:
    role, separator, content = turn.partition("=")
    if not separator or not role:
        raise PromptError(f"--turn {turn!r} names no role: write for example --turn user={turn!r}")
    return {"role": role, "content": content}


def _print(ids: list[int], pieces: list[str] | None, as_json: bool) -> None:
    if as_json:
        print_json({"ids": ids} if pieces is None else {"ids": ids, "pieces": pieces})
        return
    if pieces is None:
        click.echo(",".join(map(str, ids)))
    for token, piece in zip(ids, pieces or (), strict=False):
        click.echo(f"{token:>8}  {piece!r}")
    note(f"{len(ids)} tokens")
