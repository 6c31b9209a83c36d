"""API keys: where they come from, and a comparison that tells nothing by its time."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from starling.engine.errors import UserError
from starling.serving.api.api_errors import unauthorized
from starling.serving.http.answer import Refusal

VARIABLE = "STARLING_API_KEY"
#: What stands under this path needs a key; health and metrics do not.
PROTECTED = "/v1/"


def read_api_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys: each line of `file`, else STARLING_API_KEY, else none. Raises UserError for a file without a key."""
    if file is None:
        key = environment.get(VARIABLE)
        if key is not None and not key.strip():
            raise UserError(f"{VARIABLE} is set but empty: give it a key, or unset it to serve without one")
        return (key.strip(),) if key is not None else ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--api-key-file {file} cannot be read: {reason}; give another file") from None
    keys = tuple(line.strip() for line in lines if line.strip())
    if not keys:
        raise UserError(f"--api-key-file {file} has no key: write one on each line")
    return keys


class ApiKeyGuard:
    """Lets requests pass that bear one of the keys; several make it possible to change them without a gap."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or pass the request on."""
        guarded = scope["type"] == "http" and scope["path"].startswith(PROTECTED)
        if guarded and not self._allows(Headers(scope=scope).get("authorization", "")):
            await Refusal(unauthorized())(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _allows(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip().encode("latin-1", "replace"))
        # Every key is compared, and digests are of one length: the time says nothing about how near a guess came.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
