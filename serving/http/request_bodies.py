"""What a client asks for: the bodies of /v1/completions and /v1/chat/completions, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from starling.engine.errors import shown
from starling.engine.generation.sampling_params import SamplingParams
from starling.engine.text.tool_formats import ToolFormat
from starling.serving.api.api_errors import ApiError, bad_field
from starling.serving.api.fields import LIKE_A_KNOWN, Fields, Unsupported
from starling.serving.api.messages import TEMPLATE_FIELDS, read_messages, read_template_variables
from starling.serving.api.sampling_fields import (
    IGNORED_FIELDS,
    MOST_CHOICES,
    MOST_LOGPROBS,
    SAMPLING_FIELDS,
    read_cache_salt,
    read_choices,
    read_deadline,
    read_sampling,
)
from starling.serving.api.tool_fields import TOOL_FIELDS, ToolUse, read_tools

Messages: TypeAlias = list[dict[str, Any]]

#: OpenAI's default for /v1/completions; a chat goes on to the end of the KV cache.
COMPLETION_TOKENS = 16

#: OpenAI's defaults; those of the bundle go before them.
API_DEFAULTS: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}

UNSUPPORTED_COMPLETION: Unsupported = {
    "suffix": (("",), "text is generated at the end of the prompt only"),
}
UNSUPPORTED_CHAT: Unsupported = {
    "functions": (([],), "it is not supported; send tools"),
    "function_call": (("none", "auto"), "it is not supported; send tool_choice"),
    "modalities": ((["text"],), "only text is generated"),
    "audio": ((), "it is not supported"),
    "prediction": ((), "it is not supported"),
    "moderation": ((), "it is not supported"),
    "verbosity": (("medium",), "it is not supported; say it in a message"),
    "web_search_options": ((), "it is not supported"),
    "add_generation_prompt": ((True,), "the answer always begins a message of its own"),
    "chat_template": ((), "it is not supported; `template` names one of the bundle's"),
    "continue_final_message": ((False,), "the answer always begins a message of its own"),
    "documents": (([],), "it is not supported; put them into a message"),
}

#: All that a body may name. Anything else is refused where it looks misspelt or the server is strict, else ignored.
_COMMON = SAMPLING_FIELDS | {
    *("model", "stream", "stream_options", "logprobs", "n", "best_of", "reward_model", "cache_salt"),
    *("priority", "prompt_logprobs"),
}
COMPLETION_FIELDS = _COMMON | IGNORED_FIELDS | {"prompt", "echo", *UNSUPPORTED_COMPLETION}
CHAT_FIELDS = _COMMON | IGNORED_FIELDS | TOOL_FIELDS | TEMPLATE_FIELDS | {"messages", "template", "top_logprobs"}
CHAT_FIELDS |= UNSUPPORTED_CHAT.keys()

#: Of either sign.
MOST_PRIORITY = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server accepts. `defaults` are sampling settings of requests that do not name them."""

    models: tuple[str, ...]
    #: Positions of the KV cache.
    max_seq: int
    #: Longest prompt, in tokens.
    max_prompt: int
    #: Generations of one request, of all its prompts together: more than run and wait at once can never be taken.
    max_choices: int = MOST_CHOICES
    defaults: Mapping[str, Any] = field(default_factory=dict)
    #: Whether unknown fields are all refused.
    strict: bool = False
    #: Whether known prefixes are kept apart by API key.
    isolate: bool = False
    #: Models that may judge the candidates of a prompt.
    reward_models: tuple[str, ...] = ()

    @property
    def least_alike(self) -> float:
        """How alike an unknown field's name must be to a known one's to be refused."""
        return 0.0 if self.strict else LIKE_A_KNOWN


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """One request, checked but for its prompts' lengths. It has either `prompts` or chat `messages`."""

    model: str
    params: SamplingParams
    stream: bool
    include_usage: bool
    deadline_s: float | None
    prompts: tuple[str | list[int], ...] = ()
    messages: Messages | None = None
    #: Choices that each prompt gets, and generations of it that they are taken from: the likeliest first, or those of
    #: the highest reward by the model of that name.
    choices: int = 1
    candidates: int = 1
    reward_model: str | None = None
    #: The chat template by name; None is the bundle's default.
    template: str | None = None
    #: What the client hands to the template.
    variables: Mapping[str, Any] = field(default_factory=dict)
    #: Whether the answer begins with its prompt.
    echo: bool = False
    #: The tools that it may call, and the form in which the model of the template writes calls.
    tools: ToolUse | None = None
    tool_format: ToolFormat | None = None
    #: Names of fields that nobody knows.
    ignored: tuple[str, ...] = ()
    #: Known prefixes are shared among requests of the same salt alone.
    cache_salt: str = ""
    #: Of the requests that wait the lowest is next; whose it is: what waits is fair between owners.
    priority: int = 0
    owner: str = ""
    #: Alternatives of each token of the prompt, in vLLM's shape; None: they are not asked for.
    prompt_logprobs: int | None = None

    def of_owner(self, owner: str, *, isolate: bool) -> ApiRequest:
        """The request as one of its owner's, where there is one; with `isolate` its prefixes are its own."""
        if not owner:
            return self
        return replace(self, owner=owner, cache_salt=f"{owner} {self.cache_salt}" if isolate else self.cache_salt)

    @property
    def generations(self) -> int:
        """How many generations answer it."""
        return self.candidates * (len(self.prompts) or 1)

    @property
    def candidate_params(self) -> SamplingParams:
        """The settings of a candidate. To find the likeliest of several, log-probabilities are needed."""
        ranked = self.candidates > self.choices and self.params.logprobs is None and self.reward_model is None
        return replace(self.params, logprobs=0) if ranked else self.params

    @property
    def prompt_field(self) -> str:
        """The field that an error in the prompt names."""
        return "prompt" if self.messages is None else "messages"


def completion_request(document: Mapping[str, Any], limits: Limits) -> ApiRequest:
    """The body of /v1/completions. Raises ApiError that names the field."""
    fields = Fields(document)
    ignored = fields.refuse_unknown(COMPLETION_FIELDS, elsewhere=CHAT_FIELDS, least=limits.least_alike)
    model = read_model(fields, limits)
    fields.refuse_unsupported(UNSUPPORTED_COMPLETION)
    logprobs = _count("logprobs", fields.optional("logprobs", int))
    params = read_sampling(fields, limits.defaults, max_tokens=COMPLETION_TOKENS, logprobs=logprobs)
    echo = fields.get("echo", bool, False)
    stream, include_usage = _streaming(fields)
    scored = _prompt_logprobs(fields, stream=stream)
    params = replace(params, prompt_logprobs=_most(scored, logprobs if echo else None))
    prompts = _prompts(fields)
    choices, candidates = _candidates(fields, limits, len(prompts), stream=stream)
    return ApiRequest(
        model,
        params,
        stream,
        include_usage,
        read_deadline(fields),
        prompts=prompts,
        choices=choices,
        candidates=candidates,
        reward_model=_reward_model(fields, limits, stream=stream),
        echo=echo,
        ignored=ignored,
        cache_salt=read_cache_salt(fields),
        priority=_priority(fields),
        prompt_logprobs=scored,
    )


def chat_request(document: Mapping[str, Any], limits: Limits) -> ApiRequest:
    """The body of /v1/chat/completions. Raises ApiError that names the field."""
    fields = Fields(document)
    ignored = fields.refuse_unknown(CHAT_FIELDS, elsewhere=COMPLETION_FIELDS, least=limits.least_alike)
    model = read_model(fields, limits)
    fields.refuse_unsupported(UNSUPPORTED_CHAT)
    params = read_sampling(fields, limits.defaults, max_tokens=limits.max_seq, logprobs=_chat_logprobs(fields))
    stream, include_usage = _streaming(fields)
    scored = _prompt_logprobs(fields, stream=stream)
    params = replace(params, prompt_logprobs=scored)
    choices, candidates = _candidates(fields, limits, 1, stream=stream)
    return ApiRequest(
        model,
        params,
        stream,
        include_usage,
        read_deadline(fields),
        messages=read_messages(fields),
        template=fields.optional("template", str),
        choices=choices,
        candidates=candidates,
        reward_model=_reward_model(fields, limits, stream=stream),
        variables=read_template_variables(fields),
        tools=read_tools(fields),
        ignored=ignored,
        cache_salt=read_cache_salt(fields),
        priority=_priority(fields),
        prompt_logprobs=scored,
    )


def read_model(fields: Fields, limits: Limits) -> str:
    """The model's name, the first of those served where there is none. Raises ApiError for one that is not served."""
    model = fields.get("model", str, limits.models[0])
    if model not in limits.models:
        raise ApiError(
            404,
            f"there is no model {shown(model)} here: use {' or '.join(limits.models)}",
            param="model",
            code="model_not_found",
        )
    return model


def _priority(fields: Fields) -> int:
    priority = fields.get("priority", int, 0)
    if abs(priority) > MOST_PRIORITY:
        raise bad_field(
            "priority", f"priority is {shown(priority)}: give -{MOST_PRIORITY} to {MOST_PRIORITY}", "invalid_value"
        )
    return priority


def _streaming(fields: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the stream ends with the usage."""
    stream = fields.get("stream", bool, False)
    options = Fields(fields.get("stream_options", dict, {}))
    if options.values and not stream:
        raise bad_field("stream_options", "stream_options is for streams: send it with stream true")
    include_usage = options.values.get("include_usage", False)
    if not isinstance(include_usage, bool):
        raise bad_field("stream_options.include_usage", "stream_options.include_usage is neither true nor false")
    return stream, include_usage


def _prompts(fields: Fields) -> tuple[str | list[int], ...]:
    """One prompt, text or token ids, or a list of them."""
    value = fields.values.get("prompt")
    if value is None:
        raise bad_field("prompt", "prompt is missing: give a string or token ids", "missing_required_parameter")
    given = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    for prompt in given:
        if not isinstance(prompt, str) and not _is_ids(prompt):
            raise bad_field("prompt", "prompt is neither a string nor a list of token ids, nor a list of such prompts")
    return tuple(given)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _candidates(fields: Fields, limits: Limits, prompts: int, *, stream: bool) -> tuple[int, int]:
    """How many choices each prompt gets, and of how many generations."""
    choices = read_choices(fields)
    candidates = read_choices(fields, "best_of", choices)
    _check_candidates(choices, candidates, stream=stream)
    _check_together(limits, prompts, choices, candidates)
    return choices, candidates


def _reward_model(fields: Fields, limits: Limits, *, stream: bool) -> str | None:
    """The model that judges the generations, None for none."""
    name = fields.optional("reward_model", str)
    if name is None:
        return None
    if name not in limits.reward_models:
        known = " or ".join(limits.reward_models)
        remedy = f"use {known}" if known else "start the server with --reward-model"
        raise bad_field("reward_model", f"there is no reward model {shown(name)} here: {remedy}", "model_not_found")
    if stream:
        problem = "a reward is known at the end of an answer: send reward_model without stream"
        raise bad_field("reward_model", problem, "invalid_value")
    return name


def _check_candidates(choices: int, candidates: int, *, stream: bool) -> None:
    if candidates < choices:
        problem = f"best_of is {candidates}, but n is {choices}: give at least as many"
        raise bad_field("best_of", problem, "invalid_value")
    if candidates > choices and stream:
        problem = "best_of is above n: which choices are the best is known at the end, so send it without stream"
        raise bad_field("best_of", problem, "invalid_value")


def _check_together(limits: Limits, prompts: int, choices: int, candidates: int) -> None:
    """Refuse what could never be queued as a whole."""
    if prompts * candidates <= limits.max_choices:
        return
    name = "best_of" if candidates > choices else "n"
    given = f"{name} is {candidates}"
    if prompts > 1:
        name, given = "prompt", f"{prompts} prompts with {candidates} generation(s) of each"
    problem = f"{given}: this server takes {limits.max_choices} in one request; send several requests"
    raise bad_field(name, problem, "invalid_value")


def _prompt_logprobs(fields: Fields, *, stream: bool) -> int | None:
    count = _count("prompt_logprobs", fields.optional("prompt_logprobs", int))
    if count is not None and stream:
        problem = "prompt_logprobs come with a whole answer: send it without stream"
        raise bad_field("prompt_logprobs", problem, "invalid_value")
    return count


def _most(*counts: int | None) -> int | None:
    """The largest of the counts that there are."""
    return max((count for count in counts if count is not None), default=None)


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.get("logprobs", bool, False), fields.optional("top_logprobs", int)
    if top is not None and not wanted:
        raise bad_field("top_logprobs", "top_logprobs is given without logprobs: send logprobs true as well")
    return _count("top_logprobs", top or 0) if wanted else None


def _count(name: str, value: int | None) -> int | None:
    if value is not None and not 0 <= value <= MOST_LOGPROBS:
        raise bad_field(name, f"{name} is {shown(value)}: give 0 to {MOST_LOGPROBS}", "invalid_value")
    return value
