"""What the decode loop asks of an execution backend, and what a backend is asked to choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from starling.engine.backends.logits import Logits
from starling.engine.errors import BackendError

Tokens = npt.NDArray[np.int64]

CUDA = "CUDAExecutionProvider"
#: Tokens that one run prefills at most on the CPU. Attention's scratch memory is chunk x length x heads; SmolLM2
#: prefills 1024 tokens within 3 % as fast in chunks of 256 as of 512 (the best), and Ctrl-C waits for one chunk.
PREFILL_CHUNK = 256
#: Positions of a block of `RowCopies`: whole blocks of a prefix are known, and copied.
PREFIX_BLOCK = 32
#: Tokens of a row that one run verifies at most: the newest one and a draft after it; and of all rows together.
MOST_VERIFIED = 17
MOST_VERIFIED_TOGETHER = 64
#: Memory of the logits of one run of `Backend.score`, as float32.
SCORE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """How a row's tokens are chosen on the device: the likeliest one where `top_k` is 1, else drawn."""

    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 1.0
    #: None draws a fresh one.
    seed: int | None = None
    min_p: float = 0.0

    def noise(self, count: int) -> npt.NDArray[np.float32]:
        """The uniform numbers [count] in [0, 1) of the first `count` draws: those of the host's sampler."""
        drawn = np.random.default_rng(self.seed).random(count).astype(np.float32)
        # Rounding to float32 may give 1, which would draw after the last token.
        below_one: npt.NDArray[np.float32] = np.minimum(drawn, np.nextafter(np.float32(1), np.float32(0)))
        return below_one


GREEDY = DeviceChoice()


class RowPart(NamedTuple):
    """Tokens that follow each other in one row, from position `start` on."""

    row: int
    start: int
    tokens: Sequence[int]


class StepOutput(Protocol):
    """What one step of k rows left behind, valid until the backend's next call."""

    def tokens(self) -> list[int]:
        """The token chosen for each row where the logits are: the likeliest one, the lowest id of equals.

        -1 for a row whose greatest logit is not finite: that says nothing about the other rows.
        """
        ...

    def logits(self) -> Logits:
        """float32 [k, vocab] after the last token of each row, a view of the backend's memory."""
        ...


class StepsAhead(Protocol):
    """Steps of the first rows that are launched before the host has seen the tokens of the step before."""

    def can_choose(self, choice: DeviceChoice, /) -> bool:
        """Whether the device makes this choice; every one takes the likeliest token."""
        ...

    def choose(self, row: int, choice: DeviceChoice, first_position: int, /) -> None:
        """Choose the row's tokens by `choice` from now on; the step that writes `first_position` has its first draw.

        Ends what was launched. `StepOutput.tokens` gives these choices as well.
        """
        ...

    def can_launch(self, rows: int) -> bool:
        """Whether a step of the first `rows` rows may be launched: few enough are under way, and it has room."""
        ...

    def launch(self, rows: int) -> None:
        """Launch a step of the first `rows` rows after all others; each writes the token that it chose last."""
        ...

    def tokens(self) -> list[int]:
        """Wait for the oldest launched step whose tokens were not asked for; the token chosen in each of its rows.

        -1 stands for a row whose greatest logit is not finite.
        """
        ...


class RowCopies(Protocol):
    """Blocks of PREFIX_BLOCK positions' keys and values, kept beside the rows, and copies between these and rows."""

    def save(self, row: int, start: int, block: int, /) -> None:
        """Copy positions start..start+PREFIX_BLOCK of a row into a block."""
        ...

    def load(self, block: int, row: int, start: int, /) -> None:
        """Copy a block into positions start..start+PREFIX_BLOCK of a row."""
        ...

    def fork(self, source: int, target: int, positions: int, /) -> None:
        """Copy the first positions of one row into another."""
        ...


class Backend(Protocol):
    """A loaded model with a KV cache of `max_batch` rows of `max_seq` positions, allocated once.

    Not thread-safe: one thread at a time may call a backend.
    """

    name: str
    #: Execution provider in use, for example "CPUExecutionProvider".
    provider: str
    max_seq: int
    max_batch: int
    vocab_size: int
    #: Tokens that one run prefills at most.
    prefill_chunk: int
    #: Memory of the whole KV cache, in bytes.
    kv_cache_bytes: int
    #: Seconds spent inside the model's run since the backend was opened; the rest of a step is host time. Of a step
    #: that was launched ahead it is what `StepsAhead.tokens` waited for.
    model_seconds: float
    #: Why it was not another backend that "auto" took; None where there is nothing to say.
    note: str | None
    #: Instruction set of the engine's own CPU kernels where they run the bundle ("avx512-vnni", "avx2"), else None.
    kernels: str | None
    #: Why they do not run a bundle that has a graph for them; None where there is nothing to say.
    kernels_note: str | None

    @property
    def steps_ahead(self) -> StepsAhead | None:
        """Where tokens are chosen and fed on the device: how to run steps ahead of the host. None elsewhere."""
        ...

    def prefill(self, row: int, tokens: Tokens, start: int) -> StepOutput:
        """Write `tokens` int64 [n] at positions start..start+n of row `row`; the output is of that one row.

        `start` may lie after a non-empty cache: positions before it are attended to, those after it are overwritten.
        """
        ...

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> StepOutput:
        """One step of the first k rows: token i of `tokens` [k] is written at `positions`[i] of row i."""
        ...

    #: Rows whose drafts are verified together: one by `verify`, several by `mix`; 0 where none is.
    verified_rows: int

    def check_verifies(self) -> None:
        """Raise BackendError, with the reason, where `verify` is not to be had."""
        ...

    def verify(self, row: int, tokens: Sequence[int], start: int) -> StepOutput:
        """Write `tokens` [n] at positions start..start+n of row `row`, and choose a token after each of them.

        For a backend that cannot `mix`. The output has n rows, at most MOST_VERIFIED: row j is what follows tokens
        0..j. Raises BackendError as `check_verifies` does, and for more than that.
        """
        ...

    #: Tokens that `mix` takes at most: 0 where it is not to be had.
    most_mixed: int

    def mix(self, parts: Sequence[RowPart], kept: Sequence[int]) -> StepOutput:
        """Write tokens of several rows, as many of each as there are, in one run: a decode step, drafts and prefills.

        The rows are in ascending order. `kept` are the tokens that a token is chosen after, in ascending order: indices
        into the tokens of all parts, one part after the other. The output has a row for each, at most
        MOST_VERIFIED_TOGETHER or, where it is more, `max_batch`. Raises BackendError where it is not to be had, and for
        what does not fit.
        """
        ...

    #: Tokens that `score` takes at most: 0 where it is not to be had.
    most_scored: int

    def check_scores(self) -> None:
        """Raise BackendError, with the reason, where `score` is not to be had."""
        ...

    def score(self, row: int, tokens: Tokens, start: int) -> StepOutput:
        """`prefill` of at most `most_scored` tokens int64 [n], with logits after each of them.

        The output has n rows: row j is what follows tokens 0..j. Its memory, SCORE_BYTES at most (more only for
        MOST_VERIFIED rows of a larger vocabulary), is allocated by the first call. Raises BackendError as
        `check_scores` does, and for more tokens than that.
        """
        ...

    def row_copies(self, blocks: int) -> RowCopies | None:
        """Memory for so many blocks, and copies between it and rows; None where this backend has none.

        Raises BackendError where memory is missing.
        """
        ...

    def clear(self, row: int) -> None:
        """Forget what row `row` holds, so that numbers that are not finite cannot reach the next prompt there."""
        ...

    def close(self) -> None:
        """Free the model and the cache; the backend cannot be used afterwards."""
        ...


def chunk_length(remaining: int, most: int) -> int:
    """Tokens of the next chunk of a prompt with `remaining` left: at most `most`, and not so many that one is left.

    One token alone takes a decode step's kernels, which round differently: how a prompt is cut would then show in its
    logits (measured on ONNX Runtime: otherwise they are the same bits).
    """
    return most - 1 if remaining == most + 1 and most > 2 else min(remaining, most)


def most_scored(vocab_size: int, prefill_chunk: int) -> int:
    """Tokens of one run of `Backend.score`: no more than a run prefills, nor than SCORE_BYTES hold the logits of."""
    return min(prefill_chunk, max(MOST_VERIFIED, SCORE_BYTES // (4 * vocab_size)))


def check_scored(count: int, most: int) -> None:
    """Raise BackendError for a number of tokens that one run of `Backend.score` cannot take."""
    if not 1 <= count <= most:
        raise BackendError(f"{count} tokens are to be scored in one run: give 1 to {most}")


class CacheSize(Protocol):
    """Rows of a KV cache, and positions of each."""

    max_batch: int
    max_seq: int


def check_room(backend: CacheSize, row: int, position: int) -> None:
    """Raise BackendError where the backend's cache has no such position of such a row."""
    if position >= backend.max_seq or not 0 <= row < backend.max_batch:
        raise BackendError(
            f"position {position} of row {row} lies outside the KV cache "
            f"({backend.max_batch} rows of {backend.max_seq} positions); open the engine with more"
        )
