"""API keys: where they come from, and a comparison that tells nothing by its time."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from starling.engine.errors import UserError
from starling.serving.api.api_errors import unauthorized
from starling.serving.http.body import Refusal
from starling.serving.http.request_log import request_trace

LOGGER = logging.getLogger("starling.serve")

VARIABLE = "STARLING_API_KEY"
#: Paths that need no key: all others do.
OPEN = frozenset({"/health", "/ready", "/metrics"})
#: What a header may have around its value. Other white space, as a text has it, may be a piece of a key in UTF-8.
_BLANK = b" \t\r"
#: A file of keys is small; what is larger is something else.
_MOST_BYTES = 2**20


def read_api_keys(file: Path | None, environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys: each line of `file`, else STARLING_API_KEY, else none.

    Raises UserError for a file without a key, or one that any user may write to.
    """
    if file is None:
        key = environment.get(VARIABLE)
        if key is not None and not key.strip():
            raise UserError(f"{VARIABLE} is set but empty: give it a key, or unset it to serve without one")
        return () if key is None else (_key(os.fsencode(key)).decode(errors="surrogateescape"),)
    try:
        with file.open("rb") as opened:
            mode = os.fstat(opened.fileno()).st_mode
            content = opened.read(_MOST_BYTES + 1)
        content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"--api-key-file {file} cannot be read: {reason}; give another file") from None
    if len(content) > _MOST_BYTES:
        raise UserError(f"--api-key-file {file} has more than {_MOST_BYTES} bytes: give a file of keys, one a line")
    lines = map(_key, content.split(b"\n"))
    keys = tuple(line.decode() for line in lines if line.strip())
    if not keys:
        raise UserError(f"--api-key-file {file} has no key: write one on each line")
    _check_mode(file, mode)
    return keys


def _key(line: bytes) -> bytes:
    return line.strip(_BLANK)


def _check_mode(file: Path, mode: int) -> None:
    if os.name != "posix" or not stat.S_ISREG(mode):
        return
    if mode & stat.S_IWOTH:
        raise UserError(
            f"--api-key-file {file} can be written by every user of this machine (mode {stat.S_IMODE(mode):04o}), who "
            f"could add a key: chmod 600 {file}"
        )
    if mode & stat.S_IROTH:
        LOGGER.warning(f"--api-key-file {file} can be read by every user of this machine: chmod 600 {file}")


class ApiKeyGuard:
    """Lets requests pass that bear one of the keys; several make it possible to change them without a gap."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode(errors="surrogateescape")) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or pass the request on."""
        if scope["type"] == "http" and scope["path"] not in OPEN:
            scheme, _, key = _authorization(scope).partition(b" ")
            digest = _digest(_key(key))
            if not self._allows(scheme, digest):
                await Refusal(unauthorized())(scope, receive, send)
                return
            request_trace(scope).owner = digest.hex()
        await self._app(scope, receive, send)

    def _allows(self, scheme: bytes, digest: bytes) -> bool:
        # Every key is compared, and digests are of one length: the time says nothing about how near a guess came.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _authorization(scope: Scope) -> bytes:
    """The header as it came. A text of it, as frameworks have it, is in Latin-1, and a key in UTF-8 in pieces."""
    value: bytes = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    return value


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
