"""`starling triton`: a model repository for NVIDIA Triton Inference Server over a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from starling.cli.shared.next_commands import quoted
from starling.cli.shared.options import (
    Choice,
    backend_options,
    bundle_argument,
    check_backend,
    draft_option,
    max_batch_option,
    max_queue_option,
    max_seq_option,
    prefix_cache_option,
    refuse_options,
    speculation_option,
    speculation_settings,
    verify_option,
)
from starling.engine.errors import UserError
from starling.engine.names import GPU_BACKENDS

#: What the repository of a bundle has, by its task, and what --max-batch counts.
_WRITTEN = {
    "generate": (
        "models starling, ensemble and tensorrt_llm (TensorRT-LLM's names) and vllm_model (vLLM's)",
        "requests at a time",
    ),
    "score": ("model starling, which scores texts", "texts in a run"),
    "embed": ("model starling, which embeds texts", "texts in a run"),
}


@click.command()
@bundle_argument
@click.argument("repository", metavar="REPO", type=click.Path(path_type=Path))
@click.option(
    "--instance-kind", type=Choice(("cpu", "gpu")), default="cpu", show_default=True, help="Where the engine runs."
)
@max_batch_option(8, "Requests that run together: rows of the KV cache.")
@max_seq_option
@max_queue_option(128)
@backend_options
@speculation_option
@draft_option
@prefix_cache_option
@click.option(
    "--env",
    "environment",
    type=click.Path(path_type=Path),
    help="Environment that Triton activates for the models (EXECUTION_ENV_PATH).  [default: the server's PATH]",
)
@click.option("--copy", is_flag=True, help="Copy the bundle into the repository instead of naming its path.")
@click.option("--force", is_flag=True, help="Replace a repository that Starling wrote.")
@verify_option
def command(bundle: Path, repository: Path, verify: bool, **options: Any) -> None:
    """Write a Triton model repository REPO that serves BUNDLE under the names of TensorRT-LLM and of vLLM.

    The repository holds one engine and three entries over it, and says in its README.md how to start it, bare or in
    NVIDIA's container. A bundle that scores or embeds texts becomes one model, which answers raw float32 numbers.

    \b
    Examples:
      starling triton smollm2 repository
      starling triton smollm2 repository --max-batch 16 --max-seq 4096 --force
      starling triton smollm2-trt repository --instance-kind gpu --backend tensorrt --copy
    """
    _check_settings(options)
    from starling.engine.bundle.manifest import Bundle
    from starling.engine.draft_bundle import check_draft
    from starling.engine.errors import PromptError
    from starling.serving.triton.repository import RepositoryOptions, write_repository

    opened = Bundle.open(bundle, verify=verify)
    if opened.task != "generate":
        _check_scoring(options)
    if options["draft"] is not None:
        check_draft(Bundle.open(options["draft"], verify=verify), opened)
    settings = RepositoryOptions(**options)
    most = opened.architecture.max_positions
    if settings.max_seq is not None and not 1 <= settings.max_seq <= most:
        raise PromptError(f"--max-seq is {settings.max_seq}, but this model has {most} positions: give 1 to {most}")
    write_repository(opened, repository, settings)
    models, each = _WRITTEN[opened.task]
    click.echo(
        f"{click.style(str(repository), bold=True)}: {models}, {settings.max_batch} {each}, {settings.instance_kind}"
    )
    make, start = (quoted(repository / name) for name in ("make_environment.sh", "start.sh"))
    click.echo(f"next: SERVER=1 {make} ENV && ENVIRONMENT=ENV {start}")


def _check_settings(options: dict[str, Any]) -> None:
    """Raise UserError for settings that do not go together."""
    speculation_settings(options)
    check_backend(options)
    kind, backend = options["instance_kind"], options["backend"]
    if kind == "cpu" and backend in GPU_BACKENDS:
        raise UserError(f"--backend {backend} runs on a GPU: add --instance-kind gpu")
    if kind == "gpu" and backend == "onnxruntime-cpu":
        raise UserError(f"--backend {backend} runs on a CPU: leave --instance-kind gpu out, or choose another backend")


def _check_scoring(options: dict[str, Any]) -> None:
    """Raise UserError for settings that mean nothing to a bundle that scores or embeds."""
    refuse_options(
        ["speculation", "draft", "prefix_cache", "engine"], "is about generating text, which this bundle does not"
    )
    if options["instance_kind"] == "gpu":
        raise UserError("--instance-kind gpu: no backend on a GPU runs bundles that score or embed: leave it out")
