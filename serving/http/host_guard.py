"""Which names a server answers to: a web page whose own name was made to point here is another site's page."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from starling.engine.errors import shown
from starling.serving.api.api_errors import ApiError
from starling.serving.http.body import Refusal

#: Any name passes.
ANY = "*"


class HostGuard:
    """Answers requests whose Host is an IP address, `localhost`, or one of some names; others get 403.

    An address cannot be made to point elsewhere, so that a page which a browser loaded from it is our own. (Starlette's
    TrustedHostMiddleware would have every address of the machine listed, and refuses in plain text.)
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]) -> None:
        """`names`: in any case; `*.example.com` is every name below that one, `*` any at all."""
        self._app = app
        self._names = frozenset(name.lower() for name in names) | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 or pass the request on."""
        host = Headers(scope=scope).get("host") if scope["type"] == "http" else None
        # Browsers always name a host; HTTP/1.0 need not.
        if host is None or self._allows(host):
            await self._app(scope, receive, send)
        else:
            message = (
                f"this server does not answer to the Host {shown(host)}: the operator can name it by --allowed-host"
            )
            await Refusal(ApiError(403, message, code="host_not_allowed"))(scope, receive, send)

    def _allows(self, host: str) -> bool:
        name = _without_port(host).lower()
        above = {f"*{name[at:]}" for at, char in enumerate(name) if char == "."}
        return ANY in self._names or name in self._names or bool(above & self._names) or is_address(name)


def is_address(name: str) -> bool:
    """Whether it is an IP address, that of version 6 in brackets or not."""
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _without_port(host: str) -> str:
    name, separator, port = host.rpartition(":")
    return name if separator and (port.isdecimal() or not port) and ("]" not in port) else host
