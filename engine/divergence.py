"""How far one model's next-token distributions are from another's: perplexity, KL divergence, top-1 agreement.

With p the reference's distribution and q the model's: perplexity exp(mean(-log q(next token))); KL(p || q) in nats
(Kullback and Leibler, 1951), per position; top-1 agreement is the share of positions where both have the same likeliest
token. Everything is computed in float64 from the logits, so that a KL of 1e-10 still means something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Divergence:
    """From a reference, over the same positions. KL in nats, agreement in 0 … 1, the difference in logits."""

    reference_perplexity: float
    mean_kl: float
    max_kl: float
    top1_agreement: float
    max_abs_logit_diff: float


@dataclass(frozen=True, slots=True)
class Quality:
    """Perplexity over `positions` next tokens of a text; `divergence` None where there was no reference."""

    positions: int
    perplexity: float
    divergence: Divergence | None


@dataclass(slots=True)
class QualityTotals:
    """Adds positions up, some at a time, so that no text's logits need to be in memory at once."""

    _nll: list[NDArray[np.float64]] = field(default_factory=list)
    _reference_nll: list[NDArray[np.float64]] = field(default_factory=list)
    _kl: list[NDArray[np.float64]] = field(default_factory=list)
    _agree: list[NDArray[np.bool_]] = field(default_factory=list)
    _difference: float = 0.0

    def add(self, logits: Logits, next_ids: Sequence[int], reference: Logits | None = None) -> None:
        """Positions with `logits` [n, vocab], whose text goes on with `next_ids` [n]; `reference` [n, vocab]."""
        rows, ids = np.arange(len(next_ids)), np.asarray(next_ids)
        log_q = log_softmax(logits)
        self._nll.append(-log_q[rows, ids])
        if reference is None:
            return
        log_p = log_softmax(reference)
        self._reference_nll.append(-log_p[rows, ids])
        self._kl.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
        self._agree.append(reference.argmax(axis=1) == logits.argmax(axis=1))
        self._difference = max(self._difference, float(np.abs(reference - logits).max()))

    def quality(self) -> Quality:
        """The figures of all positions so far, of which there must be one."""
        nll = np.concatenate(self._nll)
        return Quality(len(nll), float(np.exp(nll.mean())), self._divergence() if self._kl else None)

    def _divergence(self) -> Divergence:
        kl = np.concatenate(self._kl)
        return Divergence(
            reference_perplexity=float(np.exp(np.concatenate(self._reference_nll).mean())),
            mean_kl=float(kl.mean()),
            max_kl=float(kl.max()),
            top1_agreement=float(np.concatenate(self._agree).mean()),
            max_abs_logit_diff=self._difference,
        )


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Of each row, in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
