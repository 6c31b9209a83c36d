"""What an entry asks of the engine, what it hears back, and both as lines of JSON on the socket between them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from starling.engine.generation.results import FinishReason
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.text.grammar import GrammarSpec

#: The longest line on the socket, in bytes, and the longest prompt, in characters, which JSON makes 12 bytes at most.
LINE_LIMIT = 2**24
PROMPT_LIMIT = 1_000_000

#: invalid: the client's mistake. unavailable: may be tried again. cancelled: nobody waits for it. internal: ours.
ErrorKind = Literal["invalid", "unavailable", "cancelled", "internal"]


class RequestError(Exception):
    """A request that gets an error in place of an answer; the message names the field where one is at fault."""

    def __init__(self, message: str, kind: ErrorKind = "invalid") -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt and how to continue it."""

    prompt: str
    params: SamplingParams
    #: Answers to it.
    choices: int = 1
    #: Known prefixes are shared among jobs of the same salt alone.
    cache_salt: str = ""

    def to_line(self) -> bytes:
        """One line of JSON."""
        return _line(asdict(self))

    @classmethod
    def from_line(cls, line: bytes) -> Job:
        """The job of a line that `to_line` wrote."""
        document = json.loads(line)
        params = document["params"]
        if params["grammar"] is not None:
            params["grammar"] = GrammarSpec(**params["grammar"])
        return cls(**document | {"params": SamplingParams(**params)})


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's natural-log probability and text; `top` has (id, logprob, text) of the likeliest, best first."""

    token: int
    logprob: float
    text: str
    top: tuple[tuple[int, float, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Times:
    """When the parts of an answer came, in seconds after `submitted_ns` of the system's monotonic clock; its drafts."""

    submitted_ns: int
    queue_s: float
    ttft_s: float
    total_s: float
    drafted_tokens: int
    accepted_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What one or more tokens added to an answer: text, the number of tokens, their log-probabilities if asked for."""

    text: str = ""
    tokens: int = 0
    logprobs: tuple[Logprob, ...] = ()
    finish_reason: FinishReason | None = None
    #: Tokens of the prompt; 0 until the last delta.
    prompt_tokens: int = 0
    #: None until the last delta.
    times: Times | None = None
    #: Which answer to the prompt.
    index: int = 0

    def __add__(self, later: Delta) -> Delta:
        return replace(
            later,
            text=self.text + later.text,
            tokens=self.tokens + later.tokens,
            logprobs=self.logprobs + later.logprobs,
        )

    def sent(self) -> Delta:
        """What is left of it for the next response: how its answer ended, where it has."""
        return replace(self, text="", tokens=0, logprobs=())


def delta_line(delta: Delta) -> bytes:
    """A delta as one line."""
    return _line(asdict(delta))


def error_line(error: RequestError) -> bytes:
    """An error as one line; it is the last."""
    return _line({"error": str(error), "kind": error.kind})


def read_delta(line: bytes) -> Delta:
    """The delta of a line. Raises RequestError where the line is an error."""
    fields: dict[str, Any] = json.loads(line)
    if "error" in fields:
        raise RequestError(fields["error"], fields["kind"])
    fields["logprobs"] = tuple(
        Logprob(one["token"], one["logprob"], one["text"], tuple(map(tuple, one["top"]))) for one in fields["logprobs"]
    )
    fields["times"] = None if fields["times"] is None else Times(**fields["times"])
    return Delta(**fields)


def _line(document: dict[str, Any]) -> bytes:
    return json.dumps(document).encode() + b"\n"
