"""Calls of tools as OpenAI's objects: whole, or in the deltas of a stream."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from starling.engine.text.tool_formats import ToolFormat
from starling.engine.text.tool_parser import CallPiece, Piece, ToolParser
from starling.serving.api.tool_fields import ToolUse


class ToolReader:
    """Reads one answer's text; its calls get ids of their own."""

    def __init__(self, known: ToolFormat, use: ToolUse) -> None:
        self._parser = ToolParser(known, use.names, parallel=use.parallel)
        self._id_length = known.id_length

    def finish_reason(self, reason: str) -> str:
        """OpenAI's word for the end of an answer that has calls."""
        return "tool_calls" if reason == "stop" and self._parser.calls else reason

    def deltas(self, text: str, *, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """What is certain with this text: text of the answer, and `tool_calls` of a delta."""
        pieces = self._parser.push(text) + (self._parser.flush() if last else [])
        texts = [piece for piece in pieces if isinstance(piece, str)]
        return "".join(texts), [self._delta(piece) for piece in _joined(pieces)]

    def whole(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        """The text of a whole answer, and its calls."""
        found, deltas = self.deltas(text, last=True)
        return found, [{name: value for name, value in delta.items() if name != "index"} for delta in deltas]

    def _delta(self, piece: CallPiece) -> dict[str, Any]:
        if piece.name is None:
            return {"index": piece.index, "function": {"arguments": piece.arguments}}
        name = uuid.uuid4().hex[: self._id_length]
        function = {"name": piece.name, "arguments": piece.arguments}
        # Templates that want nine characters refuse any others.
        own_id = name if self._id_length < 24 else f"call_{name}"
        return {"index": piece.index, "id": own_id, "type": "function", "function": function}


def _joined(pieces: Iterable[Piece]) -> list[CallPiece]:
    """The pieces of calls, those of one call as one."""
    found: dict[int, CallPiece] = {}
    for piece in pieces:
        if isinstance(piece, CallPiece):
            before = found.get(piece.index, CallPiece(piece.index, piece.name, ""))
            found[piece.index] = CallPiece(piece.index, before.name, before.arguments + piece.arguments)
    return list(found.values())
