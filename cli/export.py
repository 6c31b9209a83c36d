"""`starling export`: from a checkpoint to a bundle."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import click

from starling.cli.inspect import parity_line, precision
from starling.cli.shared.completion import BundlePath, complete_model
from starling.cli.shared.extras import require_extra
from starling.cli.shared.next_commands import after_export
from starling.cli.shared.options import Choice, json_option, refuse_options
from starling.cli.shared.output import human_bytes, human_seconds, print_json
from starling.cli.shared.progress_bar import progress_on_stderr
from starling.engine.errors import UserError
from starling.engine.names import ACTIVATION_SCHEMES, DIALECTS, DTYPES, SCHEMES, TASKS

if TYPE_CHECKING:
    from starling.engine.bundle.manifest import Bundle
    from starling.export.quantization.blocks import BlockQuantization
    from starling.export.quantization.qdq_settings import QdqQuantization

_TENSORRT, _NONE = "tensorrt", "none"
_BLOCK_OPTIONS = ("symmetric", "accuracy_level", "mean_bits")
_QDQ_OPTIONS = ("quantize_head", "keep_precision")
_CALIBRATION_OPTIONS = ("calibration", "calibration_tokens")
_ACTIVATION_OPTIONS = ("smoothing", "accept_quality")


@click.command()
@click.argument("model", shell_complete=complete_model)
@click.argument("out", type=BundlePath(path_type=Path))
@click.option("--dialect", type=Choice(DIALECTS), default="ort", show_default=True, help="Operators of the graph.")
@click.option(
    "--task",
    type=Choice(TASKS),
    help="What OUT is for; embed gives a language model's last hidden states.  [default: what MODEL is for]",
)
@click.option(
    "--pooling",
    type=Choice(("last", "mean")),
    help="--task embed: the last token's hidden state, or the mean over all tokens.  "
    "[default: as 1_Pooling/config.json says, else last]",
)
@click.option("--dtype", type=Choice(DTYPES), default="fp32", show_default=True, help="Type of what is computed.")
@click.option(
    "--max-positions",
    type=click.IntRange(64),
    help="The longest sequence that OUT takes, in tokens.  [default: the model's, up to 131072]",
)
@click.option(
    "--quant",
    type=Choice((*SCHEMES, _NONE)),
    help="Quantize weights; w8a8 and fp8 (tensorrt) activations too.  "
    "[default: none; dialect ort: of a folder with quantized weights what is nearest to them]",
)
@click.option(
    "--block-size", type=int, help="Weights that share a scale.  [default: 32; tensorrt: a channel, int4 128]"
)
@click.option(
    "--symmetric/--asymmetric",
    default=None,
    help="Whether zero is in the middle, dialect ort.  [default: symmetric for int8, which the CPU kernels want]",
)
@click.option(
    "--bits",
    "mean_bits",
    type=float,
    metavar="4-8",
    help="Bits of a projection's weights on average, int4 of dialect ort: those that lose most get 8.  [default: 4]",
)
@click.option("--accuracy-level", type=int, help="MatMulNBits' own, dialect ort: 4 multiplies in int8.  [default: 4]")
@click.option("--quantize-head", is_flag=True, help="Quantize lm_head too, dialect tensorrt.")
@click.option(
    "--keep-precision",
    multiple=True,
    metavar="PATTERN",
    help="Do not quantize these projections, e.g. '*.down_proj.weight'; repeatable; 'none' keeps none.  "
    "[default: w8a8 and fp8: those that cost most, as few as needed]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="Text (or .jsonl of texts) for int4 of dialect ort, w8a8 and fp8; 'none': int4 is rounded without.  "
    "[default: a built-in text; none for random weights]",
)
@click.option("--calibration-tokens", type=click.IntRange(64), help="How much of it is used.  [default: 4096]")
@click.option("--smoothing", type=float, help="SmoothQuant's alpha for w8a8 and fp8, 0 for none.  [default: 0.8]")
@click.option("--accept-quality", is_flag=True, help="Write a w8a8 or fp8 bundle however far it is from PyTorch.")
@click.option("--check/--no-check", default=None, help="Compare with PyTorch.  [default: unless weights are random]")
@click.option(
    "--all-logits", is_flag=True, help="model_genai.onnx gives every token's logits, for lm-eval's back ends."
)
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--force", is_flag=True, help="Replace the bundle in OUT.")
@json_option
@click.pass_obj
def command(session: Any, /, model: str, out: Path, revision: str | None, as_json: bool, **options: Any) -> None:
    """Export MODEL into the new bundle folder OUT, which appears whole or not at all.

    MODEL is a Hugging Face folder (safetensors), a hub id org/name, a .gguf file, `demo` (SmolLM2-135M-Instruct), or
    random:starling-7b, random:starling-rm-7b and random:starling-tiny for work on performance without weights. One that
    scores texts (*ForSequenceClassification, or a trunk with a v_head) becomes a bundle for `starling score`.

    \b
    Examples:
      starling export demo smollm2
      starling export demo smollm2-int8 --quant int8
      starling export berkeley-nest/Starling-LM-7B-alpha starling-7b --dtype fp16
      starling export ./my-finetune mine-int4 --quant int4 --calibration my-chats.jsonl
      starling export demo smollm2-w8a8 --dialect tensorrt --dtype fp16 --quant w8a8
      starling export random:starling-7b perf --dtype fp16
    """
    from starling.export.checkpoints.gguf_parts import check_first_part

    begin = perf_counter()
    check_first_part(Path(model))
    quantization = _check_settings(out, options)
    if not session.debug:
        _silence_libraries()
    with progress_on_stderr(lines=True) as progress:
        from starling.export.checkpoints.model_source import find_model

        def fetching(text: str) -> None:
            require_extra("export")  # before a model of gigabytes is fetched
            progress.phase(text)

        found = find_model(model, revision=revision, fetching=fetching)
        require_extra("export")
        progress.phase("loading PyTorch")
        from starling.export.checkpoints.model_source import open_checkpoint
        from starling.export.checkpoints.scoring_models import for_task
        from starling.export.exporter import ExportOptions, export_bundle
        from starling.export.quantization.calibration_choice import DEFAULT_TOKENS, Calibration

        how = ExportOptions(
            dialect=options["dialect"],
            dtype=options["dtype"],
            quantization=quantization,
            calibration=Calibration(options["calibration"], options["calibration_tokens"] or DEFAULT_TOKENS),
            check=options["check"],
            accept_quality=options["accept_quality"],
            force=options["force"],
            all_logits=options["all_logits"],
            max_positions=options["max_positions"],
        )
        progress.phase(f"opening {model}")
        checkpoint = for_task(open_checkpoint(found), options["task"], options["pooling"])
        if options["quant"] is None and checkpoint.scheme is not None and options["dialect"] == "ort":
            how = replace(how, quantization=_quantization(options | {"quant": checkpoint.scheme}))
        manifest = export_bundle(checkpoint, out, how, progress)
    seconds = perf_counter() - begin
    if as_json:
        print_json({"folder": str(out), "seconds": seconds, **manifest})
        return
    from starling.engine.bundle.manifest import Bundle

    _summarize(Bundle.open(out), seconds)


def _check_settings(out: Path, options: dict[str, Any]) -> BlockQuantization | QdqQuantization | None:
    """Refuse what can be refused before a model is looked for; how to quantize. Raises UserError."""
    scheme, dialect = None if options["quant"] == _NONE else options["quant"], options["dialect"]
    if scheme is None:
        refuse_options(("block_size", *_BLOCK_OPTIONS), "is about quantized weights: add --quant int8 or int4")
        refuse_options(_QDQ_OPTIONS, "is about quantized weights: add --quant")
    if scheme not in ACTIVATION_SCHEMES:
        refuse_options(_ACTIVATION_OPTIONS, "is about quantized activations: add --quant w8a8 or fp8")
        if scheme != "int4" or dialect == _TENSORRT:
            refuse_options(_CALIBRATION_OPTIONS, "is for --quant int4 of dialect ort, w8a8 and fp8")
    elif dialect != _TENSORRT:
        raise UserError(f"--quant {scheme} is for --dialect tensorrt; dialect {dialect} quantizes weights only")
    if dialect == _TENSORRT:
        refuse_options(_BLOCK_OPTIONS, "is for --dialect ort: TensorRT's quantization is symmetric")
    else:
        refuse_options(_QDQ_OPTIONS, "is for --dialect tensorrt")
    if dialect != "ort":
        refuse_options(["all_logits"], "is for --dialect ort: no other has a graph for onnxruntime-genai")
    if options["task"] != "embed":
        refuse_options(["pooling"], "is about embeddings: add --task embed")
    if options["check"] is False:
        refuse_options(["accept_quality"], "is about the comparison with PyTorch, which --no-check leaves out")
    from starling.export.bundle_folder import check_target

    check_target(out, force=options["force"])
    quantization = _quantization(options)
    if scheme is not None:
        from starling.export.quantization.qdq_settings import check_scheme

        check_scheme(scheme, dialect)
    if options["calibration"] is not None:
        _check_calibration(options)
    return quantization


def _check_calibration(options: dict[str, Any]) -> None:
    from starling.export.check.sample_texts import read_texts
    from starling.export.quantization.calibration_choice import Calibration

    calibration = Calibration(options["calibration"])
    if not calibration.is_off:
        read_texts(options["calibration"])
    elif options["quant"] in ACTIVATION_SCHEMES:
        calibration.require(options["quant"])
    else:
        refuse_options(["calibration_tokens"], "is about calibration, which --calibration none leaves out")


def _quantization(options: dict[str, Any]) -> BlockQuantization | QdqQuantization | None:
    if options["quant"] in (None, _NONE):
        return None
    if options["dialect"] == _TENSORRT:
        from starling.export.quantization.qdq_settings import QdqQuantization

        keep = options["keep_precision"]
        return QdqQuantization(
            options["quant"],
            block_size=options["block_size"],
            head=options["quantize_head"],
            smoothing=options["smoothing"],
            keep=None if not keep else tuple(pattern for pattern in keep if pattern != "none"),
        )
    from starling.export.quantization.blocks import BlockQuantization

    given = {name: options[name] for name in ("block_size", *_BLOCK_OPTIONS) if options[name] is not None}
    return BlockQuantization(options["quant"], **given)


def _silence_libraries() -> None:
    """Progress bars, warnings and logs of others would break ours; --debug shows them."""
    import logging
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


def _summarize(bundle: Bundle, seconds: float) -> None:
    total = sum(record.bytes for record in bundle.files.values())
    name = click.style(str(bundle.folder), bold=True)
    click.echo(f"{name}: {human_bytes(total)}, {precision(bundle)}, {bundle.dialect} dialect, {human_seconds(seconds)}")
    click.echo(f"parity: {parity_line(bundle.parity)}")
    for text in bundle.raw.get("notes", []):
        click.echo(f"note: {text}")
    click.echo(after_export(bundle))
