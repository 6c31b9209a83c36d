"""`starling evaluate`: what a bundle predicts on a text, alone or against a reference."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from starling.cli.shared.completion import BundlePath
from starling.cli.shared.options import (
    Choice,
    backend_options,
    bundle_argument,
    check_backend,
    json_option,
    kv_dtype_option,
    max_batch_option,
    refuse_options,
    renamed_option,
)
from starling.cli.shared.output import human_bytes, note, print_json, print_rows
from starling.cli.shared.progress_bar import progress_on_stderr
from starling.engine.errors import UserError
from starling.engine.names import LOGITS_DTYPES

if TYPE_CHECKING:
    from starling.engine.bundle.manifest import Bundle
    from starling.engine.names import DType
    from starling.profiling.quality.evaluation import Evaluation
    from starling.profiling.quality.stored_logits import StoredLogits

FORMAT, FORMAT_VERSION = "starling-evaluation", 1

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@bundle_argument
@click.option("--reference", type=BundlePath(path_type=Path), help="Compare with this bundle of the same model.")
@click.option("--reference-logits", type=_FILE, help="Compare with logits that --save-logits kept.")
@click.option("--text", type=_FILE, help="A text file, UTF-8.  [default: two pages that come with Starling]")
@click.option("--window", type=int, default=256, show_default=True, help="Tokens of the text that are read in one go.")
@click.option(
    "--context", type=int, default=16, show_default=True, help="Tokens of each window before the first score."
)
@max_batch_option(8, "Windows that run together: rows of the KV cache.", "--batch")
@renamed_option(
    "--text-tokens", "--max-tokens", type=click.IntRange(2), help="How much of the text is read.  [default: all]"
)
@backend_options
@kv_dtype_option
@click.option("--save-logits", type=_FILE, help="Keep this bundle's logits (.npz), as a reference for others.")
@click.option("--logits-dtype", type=Choice(LOGITS_DTYPES), default="float16", show_default=True, help="Their type.")
@click.option("--output", type=_FILE, help="Write the JSON document here too.")
@json_option
def command(
    bundle: Path,
    reference: Path | None,
    reference_logits: Path | None,
    text: Path | None,
    save_logits: Path | None,
    logits_dtype: str,
    output: Path | None,
    as_json: bool,
    kv_dtype: DType | None,
    **settings: Any,
) -> None:
    """Measure perplexity on a text; with a reference also KL divergence, top-1 agreement and the largest difference.

    The text's own tokens are fed, several windows at a time; all but each window's first tokens go through decode
    steps, as in generation. A reference is usually the fp32 bundle of the same model.

    \b
    Examples:
      starling evaluate smollm2
      starling evaluate smollm2-int8 --reference smollm2
      starling evaluate smollm2 --text book.txt --text-tokens 4096 --save-logits fp32.npz
      starling evaluate smollm2-int4 --text book.txt --text-tokens 4096 --reference-logits fp32.npz --json
    """
    if reference is not None and reference_logits is not None:
        raise UserError("--reference and --reference-logits are two references: give one")
    if save_logits is None:
        refuse_options(["logits_dtype"], "is the type of logits that are kept: add --save-logits")
    check_backend(settings)
    for file in (save_logits, output):
        if file is not None and not file.absolute().parent.is_dir():  # found out now rather than after minutes
            raise UserError(f"{file.parent} is no folder: choose another place for {file.name}")
    from starling.engine.bundle.manifest import Bundle
    from starling.profiling.quality.evaluation import Options, evaluate
    from starling.profiling.quality.evaluation_text import built_in_text, read_text

    opened, options = Bundle.open(bundle).require("generate").with_kv_dtype(kv_dtype), Options(**settings)
    with progress_on_stderr() as progress:
        progress.phase("evaluating")
        evaluation = evaluate(
            opened,
            built_in_text() if text is None else read_text(text),
            options,
            reference=_reference(reference, reference_logits),
            keep=logits_dtype if save_logits is not None else None,
            progress=progress.steps,
        )
    if save_logits is not None and evaluation.logits is not None:
        evaluation.logits.write(save_logits)
        note(f"written: {save_logits} ({human_bytes(save_logits.stat().st_size)})")
    source = reference or reference_logits
    document = _document(opened, evaluation, text.name if text else "built in", source.name if source else None)
    if output is not None:
        output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print_json(document) if as_json else _print(document)


def _reference(folder: Path | None, logits: Path | None) -> Bundle | StoredLogits | None:
    from starling.engine.bundle.manifest import Bundle
    from starling.profiling.quality.stored_logits import StoredLogits

    if folder is not None:
        return Bundle.open(folder)
    return None if logits is None else StoredLogits.read(logits)


def _document(bundle: Bundle, evaluation: Evaluation, text: str, reference: str | None) -> dict[str, Any]:
    from starling.profiling.machine.environment import describe_environment
    from starling.profiling.reports.profile_document import bundle_document

    rows, window = evaluation.tokens.shape
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "environment": asdict(describe_environment()),
        "bundle": {**bundle_document(bundle), "bytes": sum(record.bytes for record in bundle.files.values())},
        "provider": evaluation.provider,
        "text": text,
        "windows": rows,
        "window_tokens": window,
        "reference": reference,
        **asdict(evaluation.quality),
    }


def _print(document: dict[str, Any]) -> None:
    rows = [
        ("perplexity", f"{document['perplexity']:.3f} over {document['positions']} tokens ({document['text']})"),
    ]
    if (far := document["divergence"]) is not None:
        rows += [
            ("reference", f"{document['reference']}, perplexity {far['reference_perplexity']:.3f}"),
            ("KL", f"mean {far['mean_kl']:.3g}, max {far['max_kl']:.3g} nats"),
            ("top-1 agreement", f"{far['top1_agreement']:.2%}"),
            ("max |Δlogit|", f"{far['max_abs_logit_diff']:.3g}"),
        ]
    print_rows(rows)
