"""Reading a request's body within limits of size and time."""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect, Request

from starling.serving.api.api_errors import ApiError, too_large

#: Seconds in which a body must arrive.
BODY_TIMEOUT_S = 30
#: Bytes of an oversized body that are read and thrown away, so that the client comes to read the refusal.
DRAIN_BYTES = 16 * 2**20


async def read_body(request: Request, limit: int) -> bytes:
    """The body, of at most `limit` bytes. Raises ApiError: 413 for more, 408 for too slow, 415 for no JSON."""
    # What a web page may send to another site without asking is never JSON.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "the body is not said to be JSON: send Content-Type: application/json")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            return await _read(request, limit)
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {BODY_TIMEOUT_S} s: send it again") from None
    except ClientDisconnect:
        raise ApiError(400, "the body broke off") from None


async def _read(request: Request, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= limit:
            parts.append(part)
        else:
            parts.clear()
        if size > limit + DRAIN_BYTES:
            break
    if size > limit:
        raise too_large(limit)
    return b"".join(parts)
