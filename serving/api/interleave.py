"""Several asynchronous generators read as one, in the order in which their items come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def interleave(sources: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """The items of all sources, each with the index of its source; raises what the first source that fails raises.

    The end of this generator ends all sources: a reader that may stop early must close it (`contextlib.aclosing`).
    """
    if len(sources) == 1:  # the usual case needs no tasks
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    # Bounded: a source that is ahead of its reader waits. None: a source has come to its end.
    items: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(len(sources))

    async def read(index: int) -> None:
        try:
            async with aclosing(sources[index]) as source:
                async for item in source:
                    await items.put((index, item))
            await items.put(None)
        except Exception as error:
            await items.put(error)

    tasks = [asyncio.create_task(read(index)) for index in range(len(sources))]
    try:
        going_on = len(sources)
        while going_on:
            found = await items.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                going_on -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
