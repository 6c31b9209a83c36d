"""Print a stream as it comes; Ctrl-C ends the generation and keeps the text so far."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starling.engine.batching.generation_stream import GenerationStream
    from starling.engine.generation.results import GenerationResult


def print_stream(stream: GenerationStream, *, show: bool = True) -> GenerationResult:
    """Read the stream to its end, its text going to stdout as it comes unless `show` is off; the result.

    After Ctrl-C the result is the part that there was, its finish_reason "interrupted".
    """
    written = 0
    try:
        for chunk in stream:
            if show:
                written += sys.stdout.write(chunk.text)
                sys.stdout.flush()
    except KeyboardInterrupt:  # it hit us, not the engine, which would have made it the stream's last chunk
        stream.close()
    result = stream.result
    if show:
        rest = result.text[written:]
        sys.stdout.write(rest if result.text.endswith("\n") else rest + "\n")
        sys.stdout.flush()
    return result
