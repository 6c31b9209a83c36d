"""`starling verify`: whether a bundle computes on this machine's device what PyTorch computed at export."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from starling.cli.shared.options import (
    backend_options,
    bundle_argument,
    check_backend,
    json_option,
    max_batch_option,
    refuse_options,
)
from starling.cli.shared.output import note, print_json, print_rows
from starling.cli.shared.progress_bar import progress_on_stderr

if TYPE_CHECKING:
    from collections.abc import Callable

    from starling.engine.backends.backend import Backend
    from starling.engine.backends.pooling_backend import PoolingBackend
    from starling.engine.bundle.manifest import Bundle
    from starling.engine.pooling.pooled_verification import PooledVerification
    from starling.engine.verification import Verification

    Found = Verification | PooledVerification

FORMAT, FORMAT_VERSION = "starling-verification", 1


@click.command()
@bundle_argument
@max_batch_option(4, "Rows of the KV cache that run the text together.")
@backend_options
@json_option
@click.pass_context
def command(context: click.Context, /, bundle: Path, as_json: bool, max_batch: int, **settings: Any) -> None:
    """Check that a bundle computes here what PyTorch computed at export, on the CPU or GPU that runs it.

    All files are hashed. Then a short text is run in one row and in --max-batch rows together: prefill, a chunk after
    it, decode steps; its logits are compared with PyTorch's, which the export kept. Of a bundle that scores or embeds,
    texts are run alone and up to --max-batch together, and their numbers compared. Ends with status 1 where they are
    wrong.

    \b
    Examples:
      starling verify smollm2
      starling verify smollm2 --backend onnxruntime-cuda
      starling verify smollm2 --json
    """
    check_backend(settings)
    from starling.engine.bundle.manifest import Bundle
    from starling.engine.verification import kept_reference

    with progress_on_stderr() as progress:
        progress.phase("hashing the files")
        opened = Bundle.open(bundle, verify=True)
        positions = len(kept_reference(opened).tokens)
        progress.phase("opening the model")
        backend, run = _opened(opened, settings, positions, max_batch)
        try:
            if backend.note:
                note(backend.note)
            progress.phase("running the text")
            found = [run(rows) for rows in dict.fromkeys((1, max_batch))]
        finally:
            backend.close()
    is_wrong = any(result.problem for result in found)
    if as_json:
        print_json(_document(opened.folder, backend, found, is_wrong))
    else:
        _print(backend, found, is_wrong)
    if is_wrong:
        context.exit(1)


def _opened(
    bundle: Bundle, settings: dict[str, Any], positions: int, max_batch: int
) -> tuple[Backend | PoolingBackend, Callable[[int], Found]]:
    """The backend, and what compares so many rows of it."""
    if bundle.task == "generate":
        from starling.engine.backends.open_backend import open_backend
        from starling.engine.verification import verify

        backend = open_backend(bundle, name=settings.pop("backend"), max_seq=positions, max_batch=max_batch, **settings)
        return backend, lambda rows: verify(bundle, backend, rows)
    from starling.engine.backends.open_backend import open_pooling_backend
    from starling.engine.pooling.pooled_verification import verify_numbers

    refuse_options(["engine"], "is about generating text, which this bundle does not")
    name, threads = settings["backend"], settings["threads"]
    pooling = open_pooling_backend(bundle, name=name, threads=threads, max_seq=positions, max_batch=max_batch)
    return pooling, lambda rows: verify_numbers(bundle, pooling, rows)


def _document(folder: Path, backend: Backend | PoolingBackend, found: list[Found], is_wrong: bool) -> dict[str, Any]:
    from starling.profiling.machine.environment import describe_environment

    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "environment": asdict(describe_environment()),
        "bundle": str(folder),
        "provider": backend.provider,
        "kernels": backend.kernels,
        "right": not is_wrong,
        "runs": [asdict(result) for result in found],
    }


def _print(backend: Backend | PoolingBackend, found: list[Found], is_wrong: bool) -> None:
    kernels = f" with {backend.kernels} kernels" if backend.kernels else ""
    rows = [("device", f"{backend.provider}{kernels}"), ("files", "all as bundle.json says")]
    for result in found:
        title = "one row" if result.rows == 1 else f"{result.rows} rows"
        rows.append((title, result.problem or _figures(result)))
    rows.append(("verdict", "WRONG: do not use the bundle on this device" if is_wrong else "right"))
    print_rows(rows)


def _figures(result: Found) -> str:
    """How far a run is from PyTorch, in a line."""
    from starling.engine.verification import Verification

    if not isinstance(result, Verification):
        known = result.export_max_abs_diff
        at_export = "" if known is None else f", {known:.3g} at export"
        apart = f"max |Δ| {result.max_abs_diff:.3g} from PyTorch (limit {result.limit:.3g}{at_export})"
        return f"{apart}, over {result.texts} texts"
    at_export = "" if result.export_mean_kl is None else f", {result.export_mean_kl:.3g} at export"
    return (
        f"mean KL {result.mean_kl:.3g} nats from PyTorch (limit {result.kl_limit:.3g}{at_export}), top-1 "
        f"{result.top1_agreement:.1%}, max |Δlogit| {result.max_abs_logit_diff:.3g}, over {result.positions} positions"
    )
