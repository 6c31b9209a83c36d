"""One answer's place in its grammar: which tokens may come next, and what the chosen one changes.

It is a logits processor (`generation/logits_processors.py`). The mask of the next token is known as soon as the newest
one is, so that a thread computes it while the model runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from starling.engine.errors import SamplingError, one_line

if TYPE_CHECKING:
    from llguidance import LLMatcher

Logits: TypeAlias = NDArray[np.float32]
MASKED = np.float32(-np.inf)


class GrammarState:
    """One answer under a grammar. One thread uses it; `begin_mask` has another one compute its mask meanwhile."""

    def __init__(
        self,
        matcher: LLMatcher,
        vocab_size: int,
        *,
        own_ends: Sequence[int],
        other_ends: Sequence[int] = (),
        ends: bool = True,
    ) -> None:
        """`own_ends` are the end tokens that the matcher knows; with `ends` they end the answer, as `other_ends` do."""
        self._matcher, self._vocab_size = matcher, vocab_size
        known = {*own_ends, *other_ends}
        self._end_ids = frozenset(known if ends else other_ends)
        self._ends = np.array(sorted(token for token in self._end_ids if token < vocab_size), np.int64)
        self._no_ends = np.array(sorted(token for token in known - self._end_ids if token < vocab_size), np.int64)
        self._bits = np.zeros((vocab_size + 31) // 32, np.uint32)
        #: Held by who uses the matcher: the thread that computes the mask, or the answer's own.
        self._busy = Lock()
        #: Token ids, and whether they are those allowed or those forbidden; None: not computed yet.
        self._mask: tuple[bool, NDArray[np.int64]] | None = None
        #: Whether the answer is whole, and nothing but its end can follow.
        self.complete = False

    def __call__(self, logits: Logits, /) -> None:
        """Make the logits [vocab] float32 of all tokens that may not come next -inf, in place.

        Raises SamplingError where finding out takes more work than a token may.
        """
        with self._busy:
            # The thread may not have come to it: on a busy machine waiting for that takes longer than computing.
            self._mask = self._mask or self._computed()
            allowed, ids = self._mask
        if allowed:
            kept = logits[ids]
            logits.fill(MASKED)
            logits[ids] = kept
        else:
            logits[ids] = MASKED

    def accept(self, token: int, /) -> None:
        """The answer goes on with this token. Raises SamplingError for one that may not come."""
        if token in self._end_ids:
            return
        with self._busy:
            self._mask = None
            if not self._matcher.consume_token(token):
                raise self._failure()
            self.complete = self._matcher.is_stopped()

    def draft(self, tokens: Sequence[int], most: int) -> tuple[list[int], bool]:
        """What must come next, at most so many tokens, and True; else as many of `tokens` as may come, and False."""
        with self._busy:
            forced = self._matcher.compute_ff_tokens()
            if forced:
                return forced[: max(most, 0)], True
            return list(tokens[: self._matcher.validate_tokens(list(tokens))]) if tokens else [], False

    def begin_mask(self) -> None:
        """Have the mask of the next token computed on a thread, unless it is known."""
        if self._mask is None and not self.complete:
            _MASKS.put(self)

    def compute_mask(self) -> None:
        """What `begin_mask` asked for, unless the answer's own thread was quicker."""
        if not self._busy.acquire(blocking=False):
            return
        try:
            if self._mask is None and not self.complete:
                self._mask = self._computed()
        except Exception:  # the answer's own thread computes it again, and gets the error; this one goes on
            self._mask = None
        finally:
            self._busy.release()

    def _computed(self) -> tuple[bool, NDArray[np.int64]]:
        bits = self._bits
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._matcher.is_error():
            raise self._failure()
        may_come = np.unpackbits(bits.view(np.uint8), count=self._vocab_size, bitorder="little")
        may_come[self._ends] = self._matcher.is_accepting()
        may_come[self._no_ends] = 0
        if int(may_come.sum(dtype=np.int64)) * 2 < self._vocab_size:
            return True, np.flatnonzero(may_come)
        return False, np.flatnonzero(may_come == 0)

    def _failure(self) -> SamplingError:
        reason = one_line(Exception(self._matcher.get_error()))
        return SamplingError("the answer cannot go on under its grammar", detail=reason, field="grammar")


class _MaskThread:
    """Computes masks one after another; llguidance lets go of Python's lock for it. One for the whole process."""

    def __init__(self) -> None:
        self._states: SimpleQueue[GrammarState] = SimpleQueue()
        self._thread: Thread | None = None
        self._lock = Lock()

    def put(self, state: GrammarState) -> None:
        """Compute this one's, too."""
        if self._thread is None or not self._thread.is_alive():  # a forked process has only the thread that forked
            self._start()
        self._states.put(state)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = Thread(target=self._run, name="starling-grammar-masks", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            self._states.get().compute_mask()


_MASKS = _MaskThread()
