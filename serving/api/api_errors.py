"""Failures as OpenAI's API reports them: an HTTP status, and a JSON object that names the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starling.engine.errors import ClosedError, QueueFullError, StarlingError, UserError

BAD_REQUEST = "invalid_request_error"
#: Seconds after which a refused client should try again.
RETRY_AFTER_S = 1


class ApiError(Exception):
    """A refusal. `param` is the field of the request that was wrong, `code` OpenAI's word for the mistake.

    `logged` is what the log may say where the message may hold a piece of the prompt.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = BAD_REQUEST,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        logged: str | None = None,
    ) -> None:
        super().__init__(message)
        self.logged = message if logged is None else logged
        self.status, self.message, self.kind, self.param, self.code = status, message, kind, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def bad_field(param: str, message: str, code: str | None = None) -> ApiError:
    """A field of the request that is missing, of the wrong type, out of range, or not supported."""
    return ApiError(400, message, param=param, code=code)


def unauthorized() -> ApiError:
    """A missing or wrong API key."""
    return ApiError(
        401,
        "the API key is missing or wrong: send Authorization: Bearer KEY",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def too_large(limit: int) -> ApiError:
    """A body beyond the limit, in bytes."""
    return ApiError(413, f"the request body is larger than {limit} bytes: send less", code="request_too_large")


def shutting_down(problem: str = "the server is shutting down") -> ApiError:
    """The server ends, or its model has."""
    return ApiError(
        503,
        f"{problem}: try again, another replica or the restarted server will answer",
        kind="service_unavailable_error",
        code="shutting_down",
        headers={"Retry-After": str(RETRY_AFTER_S), "Connection": "close"},
    )


def out_of_time(message: str) -> ApiError:
    """A deadline passed before the generation came to its end."""
    return ApiError(504, message, kind="timeout_error", code="deadline_exceeded")


def internal(message: str) -> ApiError:
    """A failure that is not the client's mistake."""
    return ApiError(500, message, kind="server_error")


def unexpected(request_id: str) -> ApiError:
    """A failure of which the client learns nothing but where to look."""
    return internal(f"an unexpected failure; the server's log has it under the request id {request_id}")


def from_engine(error: StarlingError, prompt_field: str) -> ApiError:
    """What an engine's refusal is to a client; `prompt_field` is the field that held the prompt."""
    message = error.client_message
    if isinstance(error, QueueFullError):
        retry = {"Retry-After": str(RETRY_AFTER_S)}
        return ApiError(429, message, kind="rate_limit_error", code=error.code, headers=retry)
    if isinstance(error, ClosedError):
        return shutting_down(error.problem)
    if not isinstance(error, UserError) or error.field is None:
        return internal(message)
    param = prompt_field if error.field == "prompt" else error.field
    return ApiError(400, message, param=param, code=error.code, logged=error.problem)
