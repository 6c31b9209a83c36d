"""Chat messages to token ids by the checkpoint's own Jinja template, safe against special tokens in user text.

What a message says is plain text: a literal `<|end_of_turn|>` in it never becomes that token. For messages without
such literals the ids are those of transformers' `apply_chat_template(tokenize=True)`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from starling.engine.bundle.manifest import FILES
from starling.engine.errors import BundleError, PromptError, one_line, shown
from starling.engine.names import EXTRA_TEMPLATES
from starling.engine.text.template_renderer import SHARED, TemplateRefused
from starling.engine.text.template_variables import check_variables
from starling.engine.text.tokenizer import Literals, Tokenizer, literal_pattern, read_json_object

DEFAULT = "default"
#: The largest template; the longest of real ones has 50 kB.
MOST_BYTES = 2**20
#: Tokens that a chat may have where its caller sets no limit.
MOST_TOKENS = 2**20


#: What must stay text in the words of users and tools, and in those of the model.
Patterns: TypeAlias = tuple[re.Pattern[str], re.Pattern[str]]


class ChatTemplates:
    """The chat templates of a bundle, by name; the one used without a name is called `default`."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        """Compile the Jinja sources. Raises BundleError for one that is not Jinja."""
        self._sources = dict(sources)
        for name, source in sources.items():
            _compile(name, source)
        #: `_protected` of each tokenizer and template name; a tokenizer that is gone takes its patterns along.
        self._patterns: WeakKeyDictionary[Tokenizer, dict[str, Patterns]] = WeakKeyDictionary()

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplates":
        """Read chat_template.jinja and additional_chat_templates/NAME.jinja, which go before tokenizer_config.json.

        A bundle without any is no error until one is used. Raises BundleError where a file cannot be read.
        """
        files = {path.stem: path for path in sorted((folder / EXTRA_TEMPLATES).glob("*.jinja"))}
        if (folder / "chat_template.jinja").exists():
            files[DEFAULT] = folder / "chat_template.jinja"
        inline = _from_config(folder / "tokenizer_config.json")
        return cls(inline | {name: _read(path) for name, path in files.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """The known names, `default` first where there is one."""
        return tuple(sorted(self._sources, key=lambda name: (name != DEFAULT, name)))

    def source(self, name: str | None = None) -> str | None:
        """A template as it is written, by default the one that is used by default; None where there is none."""
        return self._sources.get(name or next(iter(self.names), ""))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        name: str | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The chat as one text, for reading: unlike `encode`, it cannot tell a literal from a special token.

        Raises PromptError as `encode` does.
        """
        literals, text = self._render_hidden(messages, tokenizer, name, add_generation_prompt, variables, MOST_TOKENS)
        return literals.reveal(text)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        *,
        name: str | None = None,
        add_generation_prompt: bool = True,
        limit: int = MOST_TOKENS,
        client_variables: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a chat, BOS and the like only where the template writes them.

        Each message has a `role` and a `content`, both strings; `variables` go to the template, and so do those of a
        client, which are checked. Raises PromptError for messages of another form, an unknown template name, a bundle
        without a template, variables that may not be given, what the template refuses, a template that takes more time
        or memory than it may, and for texts that `limit` tokens cannot hold.
        """
        if client_variables:
            check_variables(client_variables, tokenizer.special_tokens)
            variables = {**client_variables, **variables}
        literals, text = self._render_hidden(messages, tokenizer, name, add_generation_prompt, variables, limit)
        return tokenizer.encode_with_literals(text, literals)

    def _render_hidden(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        name: str | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        limit: int,
    ) -> tuple[Literals, str]:
        name = self._resolve(name)
        _check_messages(messages)
        tokenizer.check_fits(sum(map(len, _strings([messages, variables], keys=False))), limit)
        source = self._sources[name]
        literals = Literals([source, *tokenizer.added_tokens.values(), *_strings([messages, variables])])
        from_user, from_model = self._protected(tokenizer, name)
        hidden = [
            _hide(message, literals, from_model if message["role"] == "assistant" else from_user)
            for message in messages
        ]
        scope = {"tools": None, "documents": None, **tokenizer.special_tokens, **_hide(variables, literals, from_user)}
        scope |= {"messages": hidden, "add_generation_prompt": add_generation_prompt}
        try:
            text = SHARED.render(source, scope, most=limit * tokenizer.longest_token)
        except TemplateRefused as error:
            problem, reason = f"the chat template {name!r} refuses these messages", literals.reveal(one_line(error))
            raise PromptError(problem, detail=reason, field="messages") from error
        return literals, text

    def _protected(self, tokenizer: Tokenizer, name: str) -> Patterns:
        known = self._patterns.setdefault(tokenizer, {})
        if name not in known:
            known[name] = _protected(tokenizer, self._sources[name])
        return known[name]

    def _resolve(self, name: str | None) -> str:
        if not self._sources:
            what_to_do = "give the whole prompt as plain text instead"
            raise PromptError("this bundle has no chat template", detail=what_to_do, field="messages")
        wanted = DEFAULT if name is None else name
        if wanted not in self._sources:
            names = f"choose one of {', '.join(self.names)}"
            raise PromptError(f"there is no chat template {shown(wanted)}", detail=names, field="template")
        return wanted


def _protected(tokenizer: Tokenizer, source: str) -> Patterns:
    """What has to stay text in the words of users and tools, and in those of the model.

    These are the special tokens, and for users also the other added tokens that the template writes, since some
    checkpoints mark turns with them. In an answer those are the model's own: `</think>`, `<tool_call>`.
    """
    special = [text for token_id, text in tokenizer.added_tokens.items() if token_id in tokenizer.special_ids]
    markers = [text for text in tokenizer.added_tokens.values() if text in source and not text.isspace()]
    return literal_pattern({*special, *markers}), literal_pattern(special)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(messages, str | Mapping) or not messages:
        raise PromptError("there are no messages", detail="give a list with at least one", field="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            problem = f"message {index} is a {type(message).__name__}"
            raise PromptError(problem, detail="give a mapping of role and content", field="messages")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                problem = f"message {index} has the {key} {shown(message.get(key))}"
                raise PromptError(problem, detail="give a string", field="messages")


def _strings(value: Any, *, keys: bool = True) -> Iterator[str]:
    """All strings in lists and mappings, those that are keys too unless told otherwise."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value, *value.values()] if keys else [*value.values()], keys=keys)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item, keys=keys)


def _hide(value: Any, literals: Literals, pattern: re.Pattern[str]) -> Any:
    """A copy made of plain dicts, lists and scalars, which is all that a template, being foreign code, may see."""
    if isinstance(value, str):
        return literals.hide(value, pattern)
    if isinstance(value, Mapping):
        return {
            literals.hide(str(key), pattern): _hide(item, literals, pattern)
            for key, item in value.items()
            if item is not None  # templates ask whether a key is there
        }
    if isinstance(value, list | tuple):
        return [_hide(item, literals, pattern) for item in value]
    if value is None or type(value) in (bool, int, float):
        return value
    problem = f"a chat template takes strings, numbers, lists and mappings, not a {type(value).__name__}"
    raise PromptError(problem, field="messages")


def _from_config(path: Path) -> dict[str, str]:
    """The templates of tokenizer_config.json: a string, or a list of {"name", "template"}."""
    found = read_json_object(path).get("chat_template")
    if found is None:
        return {}
    try:
        sources = {DEFAULT: found} if isinstance(found, str) else {item["name"]: item["template"] for item in found}
    except (TypeError, KeyError):
        sources = {}
    if not sources or not all(isinstance(text, str) for pair in sources.items() for text in pair):
        raise BundleError(f"{path} has a chat_template that is neither a text nor a list of named ones: export again")
    return sources


def _read(path: Path) -> str:
    return FILES.text(path, most=MOST_BYTES)


def _compile(name: str, source: str) -> None:
    try:
        SHARED.compile(source)
    except TemplateRefused as error:
        where = "" if error.line is None else f", line {error.line}"
        raise BundleError(f"chat template {name!r}{where}: {one_line(error)}: mend the template") from error
