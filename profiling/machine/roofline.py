"""How near prefill and decode come to the machine's roof: what they must compute and read, from the architecture.

The roof is that of Williams, Waterman and Patterson, "Roofline" (CACM 52(4), 2009): a step of F operations that moves
B bytes takes at least max(F / peak, B / bandwidth). Operations are counted as in PaLM's appendix B (arXiv 2204.02311),
forward pass only: 2 for each weight of a matrix product, and 4 x query heads x head size for each position attended to
(scores and weighted sum). Norms, rotary embedding and softmax are left out, as there. lm_head runs on the last position
of a prefill only, and a weight counts once for every chunk that a prefill is cut into.
"""

from __future__ import annotations

from dataclasses import dataclass

from starling.engine.bundle.manifest import Bundle


@dataclass(frozen=True, slots=True)
class Work:
    """What one phase has to do at least: `operations` (a multiply and an add are two) and `bytes` read or written."""

    operations: float
    bytes: float


@dataclass(frozen=True, slots=True)
class Roof:
    """One phase beside the machine: its work, the seconds that it took, and those that the roof would allow.

    `share` is the part of the roof that was reached; above 1 where the weights fit into the processor's caches.
    """

    work: Work
    seconds: float
    roof_seconds: float
    #: "memory" or "arithmetic": which of the two the phase is bound by on this machine.
    bound: str

    @property
    def share(self) -> float:
        return self.roof_seconds / self.seconds

    @property
    def operations_per_second(self) -> float:
        return self.work.operations / self.seconds

    @property
    def bytes_per_second(self) -> float:
        return self.work.bytes / self.seconds


def under_roof(work: Work, seconds: float, *, operations_per_second: float, bytes_per_second: float) -> Roof:
    """The phase that did `work` in `seconds`, on a machine of this arithmetic peak and memory bandwidth."""
    arithmetic, memory = work.operations / operations_per_second, work.bytes / bytes_per_second
    return Roof(work, seconds, max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory")


def prefill_work(bundle: Bundle, prompt_tokens: int, chunk: int) -> Work:
    """Prefill of one row's prompt in chunks of at most `chunk` tokens."""
    layers, lm_head = _layer_weights(bundle), _lm_head_weights(bundle)
    attended = sum(_attended(bundle, position) for position in range(1, prompt_tokens + 1))
    operations = 2 * layers * prompt_tokens + 2 * lm_head + _attention(bundle, attended)
    chunks = [min(end, prompt_tokens) for end in range(chunk, prompt_tokens + chunk, chunk)]
    # Each chunk reads the weights, and the keys and values up to its own end; every position's are written once.
    cache = bundle.kv_cache.bytes_per_token * (prompt_tokens + sum(_attended(bundle, end) for end in chunks))
    return Work(operations, bundle.weights.bytes_per_token * len(chunks) + cache)


def decode_work(bundle: Bundle, prompt_tokens: int, new_tokens: int, batch: int) -> Work:
    """One decode step of `batch` rows, averaged over the steps of a run."""
    attended = mean_attended(bundle, prompt_tokens, new_tokens)
    operations = 2 * (_layer_weights(bundle) + _lm_head_weights(bundle)) + _attention(bundle, attended)
    cache = live_kv_bytes(bundle, prompt_tokens, new_tokens) + bundle.kv_cache.bytes_per_token
    return Work(operations * batch, bundle.weights.bytes_per_token + cache * batch)


def live_kv_bytes(bundle: Bundle, prompt_tokens: int, new_tokens: int) -> int:
    """Bytes of one row's cache that a decode step reads on average."""
    return round(bundle.kv_cache.bytes_per_token * mean_attended(bundle, prompt_tokens, new_tokens))


def mean_attended(bundle: Bundle, prompt_tokens: int, new_tokens: int) -> float:
    """Positions that a decode step attends to on average; step k of n - 1 attends to prompt + k of them."""
    lengths = [_attended(bundle, prompt_tokens + step) for step in range(1, new_tokens)]
    return sum(lengths) / len(lengths)


def _attended(bundle: Bundle, length: int) -> int:
    window = bundle.architecture.sliding_window
    return length if window is None else min(length, window)


def _attention(bundle: Bundle, attended: float) -> float:
    shape = bundle.architecture
    return 4 * shape.layers * shape.query_heads * shape.head_dim * attended


def _lm_head_weights(bundle: Bundle) -> int:
    return bundle.architecture.vocab_size * bundle.architecture.hidden_size


def _layer_weights(bundle: Bundle) -> int:
    """All parameters but embedding table and lm_head, which tied weights count once; norms are below 0.1 % of them."""
    tables = 1 if bundle.architecture.tied_embeddings else 2
    return bundle.architecture.parameters - tables * _lm_head_weights(bundle)
