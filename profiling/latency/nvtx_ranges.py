"""NVTX ranges around prefill and decode, for Nsight Systems; with the optional package nvtx.

`nsys profile --trace=cuda,nvtx starling profile BUNDLE --nvtx` shows them above the kernels. Not run under Nsight yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from starling.engine.backends.backend import Backend, DeviceChoice, RowCopies, RowPart, StepOutput, StepsAhead, Tokens
from starling.engine.errors import BackendError
from starling.engine.installation import install_command

DOMAIN = "starling"


class RangedBackend:
    """A backend whose every call is an NVTX range: "prefill 128 tokens", "decode 4 rows", "verify 9 tokens", …"""

    def __init__(self, backend: Backend) -> None:
        """Raises BackendError where the package nvtx is not installed."""
        try:
            self._annotate: Any = import_module("nvtx").annotate
        except ImportError as error:
            raise BackendError(f"--nvtx needs the package nvtx: {install_command('profiling')}") from error
        self._backend = backend
        self.name, self.provider, self.note = backend.name, backend.provider, backend.note
        self.kernels, self.kernels_note = backend.kernels, backend.kernels_note
        self.max_seq, self.max_batch, self.vocab_size = backend.max_seq, backend.max_batch, backend.vocab_size
        self.kv_cache_bytes, self.prefill_chunk = backend.kv_cache_bytes, backend.prefill_chunk
        self.verified_rows, self.most_scored = backend.verified_rows, backend.most_scored
        self.most_mixed = backend.most_mixed
        ahead = backend.steps_ahead
        self.steps_ahead: StepsAhead | None = None if ahead is None else RangedStepsAhead(ahead, self._annotate)

    @property
    def model_seconds(self) -> float:
        """The backend's own."""
        return self._backend.model_seconds

    @model_seconds.setter
    def model_seconds(self, seconds: float) -> None:
        self._backend.model_seconds = seconds

    def prefill(self, row: int, tokens: Tokens, start: int) -> StepOutput:
        """As the backend's."""
        with self._annotate(f"prefill {len(tokens)} tokens", domain=DOMAIN, color="blue"):
            return self._backend.prefill(row, tokens, start)

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> StepOutput:
        """As the backend's."""
        with self._annotate(f"decode {len(tokens)} rows", domain=DOMAIN, color="green"):
            return self._backend.decode(tokens, positions)

    def mix(self, parts: Sequence[RowPart], kept: Sequence[int]) -> StepOutput:
        """As the backend's."""
        tokens = sum(len(part.tokens) for part in parts)
        with self._annotate(f"mix {tokens} tokens of {len(parts)} rows", domain=DOMAIN, color="green"):
            return self._backend.mix(parts, kept)

    def check_scores(self) -> None:
        """As the backend's."""
        self._backend.check_scores()

    def score(self, row: int, tokens: Tokens, start: int) -> StepOutput:
        """As the backend's."""
        with self._annotate(f"score {len(tokens)} tokens", domain=DOMAIN, color="blue"):
            return self._backend.score(row, tokens, start)

    def check_verifies(self) -> None:
        """As the backend's."""
        self._backend.check_verifies()

    def verify(self, row: int, tokens: Sequence[int], start: int) -> StepOutput:
        """As the backend's."""
        with self._annotate(f"verify {len(tokens)} tokens", domain=DOMAIN, color="green"):
            return self._backend.verify(row, tokens, start)

    def row_copies(self, blocks: int) -> RowCopies | None:
        """As the backend's."""
        return self._backend.row_copies(blocks)

    def clear(self, row: int) -> None:
        """As the backend's."""
        self._backend.clear(row)

    def close(self) -> None:
        """As the backend's."""
        self._backend.close()


class RangedStepsAhead:
    """The same for steps that are launched ahead: "launch" is the host's part, "tokens" the wait for the device."""

    def __init__(self, ahead: StepsAhead, annotate: Any) -> None:
        self._ahead, self._annotate = ahead, annotate

    def can_choose(self, choice: DeviceChoice) -> bool:
        """As the backend's."""
        return self._ahead.can_choose(choice)

    def choose(self, row: int, choice: DeviceChoice, first: int) -> None:
        """As the backend's."""
        self._ahead.choose(row, choice, first)

    def can_launch(self, rows: int) -> bool:
        """As the backend's."""
        return self._ahead.can_launch(rows)

    def launch(self, rows: int) -> None:
        """As the backend's."""
        with self._annotate(f"launch {rows} rows", domain=DOMAIN, color="green"):
            self._ahead.launch(rows)

    def tokens(self) -> list[int]:
        """As the backend's."""
        with self._annotate("tokens", domain=DOMAIN, color="yellow"):
            return self._ahead.tokens()
