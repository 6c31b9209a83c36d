"""A generation's result for people (one line of figures, a table of log-probabilities) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from starling.cli.shared.output import human_bytes, note

if TYPE_CHECKING:
    from starling.engine.engine import Engine
    from starling.engine.generation.results import GenerationResult, Timings
    from starling.engine.generation.sampler import TokenLogprob
    from starling.engine.serving_loop import ServingLoop


def note_backend(engine: Engine) -> None:
    """Say on stderr why another backend than the likely one was taken."""
    if engine.backend.note is not None:
        note(engine.backend.note)


def figures(result: GenerationResult, engine: Engine) -> str:
    """Tokens, why it ended, TTFT, decode speed, accepted drafts and the cache's memory, in one line."""
    timings = result.timings
    prefilled = f"{timings.prefilled_tokens} of {timings.prompt_tokens}" if timings.reused_tokens else ""
    parts = [
        f"{timings.new_tokens} tokens, {result.finish_reason}",
        f"TTFT {timings.ttft_ms:.0f} ms ({prefilled or timings.prompt_tokens} prompt tokens prefilled)",
    ]
    if timings.itl_s:
        parts.append(f"{timings.tokens_per_second:.1f} tokens/s")
    if timings.drafted_tokens:
        parts.append(f"{timings.accepted_tokens} of {timings.drafted_tokens} drafted tokens accepted")
    return " · ".join([*parts, cache_figure(engine)])


def batch_figures(results: Sequence[GenerationResult], engine: Engine) -> str:
    """The same for a static batch: all tokens, and the speed of all rows together."""
    tokens = sum(result.timings.new_tokens for result in results)
    decoded = sum(len(result.timings.itl_s) for result in results)
    seconds = max(result.timings.decode_s for result in results)
    parts = [f"{len(results)} prompts, {tokens} tokens"]
    parts.append(f"TTFT {max(result.timings.ttft_ms for result in results):.0f} ms (the last prompt's)")
    if decoded:
        parts.append(f"{decoded / seconds:.1f} tokens/s together")
    return " · ".join([*parts, cache_figure(engine)])


def cache_figure(engine: Engine) -> str:
    """Memory of the KV cache and what fits into it."""
    rows = f"{engine.max_batch} x " if engine.max_batch > 1 else ""
    return f"KV cache {human_bytes(engine.kv_cache_bytes)} ({rows}{engine.max_seq} positions)"


def prefix_figure(loop: ServingLoop) -> str:
    """Memory of known prefixes and what fits into it."""
    if not loop.copies_rows:
        return "no known prefixes (this backend copies no rows)"
    size = loop.engine.kv_cache_bytes // (loop.engine.max_seq * loop.engine.max_batch) * loop.prefix_tokens
    return f"known prefixes up to {human_bytes(size)} ({loop.prefix_tokens} tokens)" if size else "no known prefixes"


def logprob_lines(result: GenerationResult, engine: Engine) -> Iterator[str]:
    """One line per token: its log-probability, its text, and the likeliest alternatives."""
    for entry in result.logprobs or ():
        alternatives = "  ".join(f"{_piece(engine, token)} {value:.4f}" for token, value in entry.top)
        yield f"{entry.logprob:9.4f}  {_piece(engine, entry.token)}" + (f"   | {alternatives}" if alternatives else "")


def _piece(engine: Engine, token: int) -> str:
    return repr(engine.tokenizer.id_to_token(token))


def generation_json(results: Sequence[GenerationResult], engine: Engine) -> dict[str, Any]:
    """The document of `generate --json`; times in ms."""
    return {
        "results": [result_json(result) for result in results],
        "load_ms": engine.load_seconds * 1e3,
        "backend": engine.backend.name,
        "provider": engine.backend.provider,
        "kv_cache": {"bytes": engine.kv_cache_bytes, "rows": engine.max_batch, "max_seq": engine.max_seq},
    }


def result_json(result: GenerationResult) -> dict[str, Any]:
    """One generation: text, token ids, why it ended, log-probabilities where asked for, timings."""
    return {
        "text": result.text,
        "finish_reason": result.finish_reason,
        "tokens": list(result.tokens),
        "prompt_tokens": list(result.prompt_tokens),
        "logprobs": None if result.logprobs is None else [_logprob_json(entry) for entry in result.logprobs],
        "timings": timings_json(result.timings),
    }


def _logprob_json(entry: TokenLogprob) -> dict[str, Any]:
    return {
        "token": entry.token,
        "logprob": entry.logprob,
        "top": [{"token": token, "logprob": value} for token, value in entry.top],
    }


def timings_json(timings: Timings) -> dict[str, Any]:
    """Timings under the names of the field; times in ms, host time in µs."""
    return {
        "prompt_tokens": timings.prompt_tokens,
        "reused_tokens": timings.reused_tokens,
        "new_tokens": timings.new_tokens,
        "time_to_first_token_ms": timings.ttft_ms,
        "inter_token_latency_ms": [seconds * 1e3 for seconds in timings.itl_s],
        "time_per_output_token_ms": timings.tpot_ms,
        "request_latency_ms": timings.total_s * 1e3,
        "tokens_per_second": timings.tokens_per_second,
        "drafted_tokens": timings.drafted_tokens,
        "accepted_tokens": timings.accepted_tokens,
        "host_us_per_token": timings.host_s_per_token * 1e6,
    }
