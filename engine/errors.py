"""The errors that Starling raises on purpose.

Every message is one line that says what was wrong, with the value, and what to do next. The command line prints it
on stderr and leaves with the class's `exit_code`: 2 for a user's mistake, 1 for a failure of the surroundings.
"""

from collections.abc import Iterable
from typing import Literal

#: What went wrong, for programs: the words of OpenAI's API where it has one for the case.
ErrorCode = Literal["context_length_exceeded", "queue_full", "shutting_down", "deadline_exceeded"]

#: How alike two names must be (difflib's ratio) for one to be a slip of the other.
_ALIKE = 0.6
#: Characters of another library's message: some quote a whole configuration.
_LONGEST_LINE = 600
#: Most characters of a value in a message.
_MOST_SHOWN = 60


def did_you_mean(word: str, names: Iterable[str], *, least: float = _ALIKE) -> str:
    """` (did you mean 'NAME'?)` for a message about an unknown `word`, with the nearest of `names`.

    "" where none is at least so alike.
    """
    from difflib import SequenceMatcher  # only a mistake needs it

    def plain(text: str) -> str:
        return text.casefold().lstrip("-")  # the dashes of two options make them no more alike

    alike = {name: SequenceMatcher(None, plain(name), plain(word)).ratio() for name in names}
    nearest = max(alike.values(), default=0.0)
    if nearest < least:
        return ""
    return f" (did you mean {' or '.join(repr(name) for name in alike if alike[name] == nearest)}?)"


def one_line(error: BaseException) -> str:
    """The message of another library's exception, its line ends become spaces; of a very long one the beginning."""
    words = " ".join(str(error).split())
    return words if len(words) <= _LONGEST_LINE else f"{words[:_LONGEST_LINE]}…"


def shown(value: object) -> str:
    """A value that a stranger may have chosen, for a message: short whatever it is, a list or mapping by its kind."""
    if isinstance(value, list | tuple | dict):
        # Its own text may be as long as the request, and takes a nesting that Python's stack does not.
        return {"list": "a list", "tuple": "a tuple"}.get(type(value).__name__, "an object")
    try:
        text = repr(value[:_MOST_SHOWN] if isinstance(value, str | bytes) else value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 1]}…"


class StarlingError(Exception):
    """A failure that is not the user's mistake: a full disk, an unreachable hub, a missing package.

    The message, `str(error)`, is `problem`, or `problem: detail`. It is for people; programs read the attributes.
    """

    exit_code = 1
    #: The argument at fault, by its name in Python ("temperature", "prompt", "messages"); None: no single one.
    field: str | None = None
    #: None: nothing that a program would treat in a way of its own.
    code: ErrorCode | None = None

    def __init__(
        self,
        problem: str,
        *,
        detail: str = "",
        client_detail: str = "",
        field: str | None = None,
        code: ErrorCode | None = None,
    ) -> None:
        """`detail` is what to do, or a reason that may quote the user's text: it belongs in no log.

        `client_detail` takes its place for the client of a server, who cannot restart it with other settings. `field`
        and `code` default to the class's own.
        """
        super().__init__(_joined(problem, detail))
        #: What was wrong, with the value.
        self.problem = problem
        #: The message for the client of a server.
        self.client_message = _joined(problem, client_detail or detail)
        if field is not None:
            self.field = field
        if code is not None:
            self.code = code


def _joined(problem: str, detail: str) -> str:
    return f"{problem}: {detail}" if detail else problem


class UserError(StarlingError):
    """Something that the user gave cannot be used as it is."""

    exit_code = 2


class BundleError(UserError):
    """A bundle is missing, truncated, altered, or of a newer format."""


class PromptError(UserError):
    """A prompt is empty, longer than the KV cache, or holds token ids outside the vocabulary.

    `field` is "prompt", or "messages" or "template" where a chat's are wrong.
    """

    field = "prompt"


class SamplingError(UserError):
    """A sampling setting is outside its range; `field` is its name in SamplingParams."""


class CheckpointError(UserError):
    """MODEL does not name a checkpoint that can be read."""


class UnsupportedModelError(UserError):
    """The model uses something that the tracer cannot lower faithfully."""


class HubError(StarlingError):
    """The model hub could not be reached, or refused."""


class BackendError(StarlingError):
    """An execution backend is not installed, or cannot run this bundle on this machine."""


class QueueFullError(StarlingError):
    """As many requests wait as may wait: the server's back-pressure. Trying again later may succeed."""

    code = "queue_full"


class ClosedError(StarlingError):
    """A serving loop that was closed takes no more requests."""

    code = "shutting_down"


class RequestFailed(StarlingError):
    """A request ended by a failure, its own or that of a step that it shared; `__cause__` is what failed."""


class DeadlineExceeded(StarlingError):
    """A request's deadline passed before its answer was complete."""

    code = "deadline_exceeded"


class BuildError(StarlingError):
    """An engine plan cannot be built: the network would not mean what the model means, or TensorRT refuses it."""


class PlanError(UserError):
    """An engine plan is missing, truncated, altered, or was built for something else than it is wanted for."""
