"""`starling inspect`: what a bundle is, without loading the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from starling.cli.shared.completion import complete_engine
from starling.cli.shared.options import bundle_argument, json_option, refuse_options
from starling.cli.shared.output import human_bytes, print_json, print_rows
from starling.engine.errors import UserError
from starling.engine.names import DEFAULT_MAX_SEQ

if TYPE_CHECKING:
    from starling.engine.bundle.manifest import Bundle


@click.command()
@bundle_argument
@click.option(
    "--max-seq",
    type=click.IntRange(1),
    help="State the KV cache for so many positions.  [default: 2048 or the model's]",
)
@click.option(
    "--engine",
    shell_complete=complete_engine,
    help="Show this TensorRT engine of the bundle instead; takes neither TensorRT nor a GPU.",
)
@click.option("--verify", is_flag=True, help="Check the SHA-256 of weights and plans too (seconds per GB).")
@json_option
def command(bundle: Path, max_seq: int | None, engine: str | None, verify: bool, as_json: bool) -> None:
    """Show a bundle's architecture, precision, sizes, quality, files and engines, and check that they are whole.

    \b
    Examples:
      starling inspect smollm2
      starling inspect smollm2 --max-seq 8192 --verify
      starling inspect smollm2 --json
      starling inspect smollm2-trt --engine tensorrt-rtx-1.7.1-sm89
    """
    if engine is not None:
        refuse_options(["max_seq"], "is about the bundle, but an engine has its own positions: leave it out")
    from starling.cli.shared.engine_summary import engine_document, engine_rows
    from starling.engine.backends.tensorrt.engine_folder import open_engine
    from starling.engine.bundle.manifest import Bundle

    opened = Bundle.open(bundle, verify=verify)
    if engine is not None:
        record = open_engine(opened, engine, verify=verify)
        print_json(engine_document(record)) if as_json else print_rows(engine_rows(record))
        return
    positions = _positions(opened, max_seq)
    if as_json:
        print_json(_document(opened, positions, verify))
        return
    print_rows(_rows(opened, positions, verify))


def _positions(bundle: Bundle, max_seq: int | None) -> int:
    most = bundle.architecture.max_positions
    if max_seq is not None and max_seq > most:
        raise UserError(f"--max-seq is {max_seq}, but this model has {most} positions: give 1 to {most}")
    return max_seq or min(DEFAULT_MAX_SEQ, most)


def _document(bundle: Bundle, positions: int, verified: bool) -> dict[str, Any]:
    """bundle.json as it is, with what follows from it."""
    from starling.cli.shared.engine_summary import engine_documents

    cache = {**bundle.raw["kv_cache"], "max_seq": positions, "bytes": bundle.kv_cache.bytes_per_token * positions}
    return {
        **bundle.raw,
        "folder": str(bundle.folder),
        "bytes": sum(record.bytes for record in bundle.files.values()),
        "kv_cache": cache,
        "weights_verified": verified,
        "engines": engine_documents(bundle, verified),
    }


def _rows(bundle: Bundle, positions: int, verified: bool) -> list[tuple[str, str]]:
    from starling.cli.shared.engine_summary import engine_lines

    arch, cache, weights = bundle.architecture, bundle.kv_cache, bundle.weights
    window = f", sliding window {arch.sliding_window}" if arch.sliding_window else ""
    total = sum(record.bytes for record in bundle.files.values())
    in_blocks = bundle.quantization.bits_per_weight if bundle.quantization else None
    bits = "" if in_blocks is None else f", {in_blocks:.2f} bits a weight in blocks"
    return [
        ("bundle", f"{bundle.folder} ({human_bytes(total)})"),
        ("source", f"{bundle.source.get('name')} ({bundle.source.get('kind')})"),
        ("task", task_line(bundle)),
        ("model", f"{arch.class_name}, {arch.parameters / 1e6:,.1f} million parameters"),
        (
            "shape",
            f"{arch.layers} layers, hidden {arch.hidden_size}, {arch.query_heads} query and {arch.kv_heads} KV heads "
            f"of {arch.head_dim}, vocabulary {arch.vocab_size}, {arch.max_positions} positions{window}",
        ),
        ("dialect", bundle.dialect),
        ("precision", precision(bundle)),
        *(("kept", name) for name in (bundle.quantization.kept if bundle.quantization else ())),
        *(("calibrated", line) for line in _calibration_lines(bundle)),
        ("weights", f"{human_bytes(weights.bytes)}, {human_bytes(weights.bytes_per_token)} read per token{bits}"),
        (
            "KV cache",
            f"{cache.dtype}, {cache.bytes_per_token:,} bytes a token, {human_bytes(cache.bytes_per_token * positions)} "
            f"for {positions} positions",
        ),
        ("tokens", f"bos {bundle.tokens.bos}, eos {', '.join(map(str, bundle.tokens.eos))}, pad {bundle.tokens.pad}"),
        ("parity", parity_line(bundle.parity)),
        *(("note", text) for text in bundle.raw.get("notes", [])),
        *(("file", f"{name} ({human_bytes(record.bytes)})") for name, record in bundle.files.items()),
        ("files", "all as bundle.json says" + ("" if verified else "; add --verify to hash the weights too")),
        *(("engine", text) for text in engine_lines(bundle, verified)),
    ]


def task_line(bundle: Bundle) -> str:
    """What the bundle is for; of one that scores or embeds, how it reads a text."""
    how = bundle.pooling
    if how is None:
        return bundle.task
    words = {
        "last": "the last token",
        "last_but_pad": f"the last token that is not {how.pad}",
        "before_first_pad": "the last token" if how.pad is None else f"the token before the first {how.pad}",
    }
    words = {name: f"read at {where}" for name, where in words.items()} | {"mean": "the mean over all tokens"}
    labels = f" {', '.join(how.labels)}" if how.labels else ""
    length = "" if how.max_length is None else f", {how.max_length} tokens, cut at the {how.truncation_side}"
    return f"{bundle.task}{labels}, {words[how.read_at]}{length}"


def precision(bundle: Bundle) -> str:
    """dtype and quantization in words."""
    how = bundle.quantization
    if how is None:
        return bundle.dtype
    if how.accuracy_level is not None:
        kind = "symmetric" if how.symmetric else "asymmetric"
        details = f"block {how.block_size}, {kind}, accuracy level {how.accuracy_level}"
        return f"{how.scheme} weights ({details}), {bundle.dtype}"
    grain = "per output channel" if how.block_size is None else f"block {how.block_size}"
    what = "weights" if how.smoothing is None else "weights and activations"
    smoothing = f", smoothing {how.smoothing:g}" if how.smoothing else ""
    kept = f", {len(how.kept)} projections kept in {bundle.dtype}" if how.kept else ""
    return f"{how.scheme} {what} (weights {grain}{smoothing}{kept}), {bundle.dtype}"


def _calibration_lines(bundle: Bundle) -> list[str]:
    """What weights or activations were calibrated on; nothing where they were not."""
    how = bundle.quantization
    if how is None or how.text is None:
        return []
    return [f"on {how.tokens:,} tokens of " + ("the built-in text" if how.text == "built in" else how.text)]


def parity_line(parity: Any) -> str:
    """The figures of the comparison with PyTorch at export, in one line."""
    if not parity:
        return "not compared with PyTorch"
    if "reference_std" in parity:
        cosine = "" if parity["min_cosine"] is None else f", cosine at least {parity['min_cosine']:.5f}"
        return (
            f"max |Δ| {parity['max_abs_diff']:.2g}, mean {parity['mean_abs_diff']:.2g}{cosine}, where PyTorch's own "
            f"differ by {parity['reference_std']:.2g} (standard deviation), over {parity['texts']} texts"
        )
    return (
        f"max |Δlogit| {parity['max_abs_logit_diff']:.2g}, KL mean {parity['mean_kl']:.2g} max {parity['max_kl']:.2g} "
        f"nats, top-1 agreement {parity['top1_agreement']:.1%}, perplexity {parity['perplexity']:.2f} "
        f"(PyTorch {parity['reference_perplexity']:.2f}), over {parity['positions']} positions"
    )
