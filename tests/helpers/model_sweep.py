"""Every causal language model of transformers, tiny and random, through the exporter and ONNX Runtime, against PyTorch.

`python tests/helpers/model_sweep.py [MODEL_TYPE …]` runs the given types, or all, each in a process of its own, and
writes what came out into the table of docs/models.md: a type that was not run keeps its line.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from families import logits_by_position, make_random
from models_page import PAGE, read_page, write_page
from tiny_configs import tiny_configs
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from starling.engine.backends.open_backend import open_backend
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import StarlingError, one_line
from starling.export.checkpoints.model_source import open_checkpoint
from starling.export.exporter import ExportOptions, export_bundle

SECONDS = 200
TOKENS = 40  # well beyond the sliding window of the tiny configurations
TOLERANCE = 1e-3
LARGEST_PARAMETERS = 400e6
#: Encoders with a head for the next token, decoders of another model, and what has no text alone: not what is meant.
LEFT_OUT = """
    bart beam bert bert-generation big_bird bigbird_pegasus blenderbot blenderbot-small camembert cpmant ctrl
    data2vec-text diffllama electra emu3 fuyu git got_ocr2 marian mbart megatron-bert mllama modernbert-decoder moshi
    musicgen musicgen_melody mvp openai-gpt pegasus plbart prophetnet reformer rembert roberta roberta-prelayernorm
    roc_bert roformer transfo trocr whisper xglm xlm xlm-roberta xlm-roberta-xl xlnet xmod
"""


@dataclass(frozen=True)
class Verdict:
    """`verdict`: right, wrong, refused, crash, no-model (none can be made by these settings) or timeout."""

    verdict: str
    why: str


def model_types() -> list[str]:
    """The decoder language models of the installed transformers."""
    return [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in LEFT_OUT.split()]


def judge(model_type: str, tokenizer: str, folder: Path) -> Verdict:
    """Make, export and run one type; `folder` is empty."""
    ids = torch.randint(3, 32000, (1, TOKENS), generator=torch.Generator().manual_seed(1))
    made = _tiny_model(model_type, tokenizer, folder / "model", ids)
    if isinstance(made, Verdict):
        return made
    try:
        export_bundle(open_checkpoint(str(folder / "model")), folder / "bundle", ExportOptions(check=False))
    except StarlingError as error:
        return Verdict("refused", str(error).replace(f"{folder}/", ""))
    except Exception as error:
        return Verdict("crash", f"{type(error).__name__}: {one_line(error)}")
    try:
        got = _logits_of(folder / "bundle", ids[0].numpy())
    except StarlingError as error:
        return Verdict("crash", f"it does not run: {error}")
    worst = max(float(np.abs(logits - made[at]).max()) for at, logits in got.items())
    is_right = worst < TOLERANCE * max(1.0, made.std()) and made.std() > 0.05
    return Verdict("right" if is_right else "wrong", f"max |d| {worst:.2g}, std {made.std():.2g}")


def _tiny_model(model_type: str, tokenizer: str, folder: Path, ids: torch.Tensor) -> np.ndarray | Verdict:
    """Save a model of the type; PyTorch's logits [tokens, vocab] on `ids`, from the files."""
    first: Exception | None = None
    for number, config in enumerate(tiny_configs(model_type)):
        attempt = folder.with_name(f"attempt-{number}")
        try:
            if isinstance(config, Exception):
                raise config
            torch.manual_seed(0)
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            if sum(p.numel() for p in model.parameters()) > LARGEST_PARAMETERS:
                raise ValueError("the shrunk configuration is not small")
            make_random(model)
            model.save_pretrained(attempt)
            (attempt / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
            whole = AutoModelForCausalLM.from_pretrained(attempt, dtype=torch.float32, attn_implementation="eager")
            with torch.inference_mode():
                logits: np.ndarray = whole.eval()(ids, use_cache=False).logits[0].float().numpy()
            attempt.rename(folder)
            return logits
        except Exception as error:
            first = first or error
    return Verdict("no-model", f"{type(first).__name__}: {one_line(first)}" if first else "")


def _logits_of(bundle: Path, tokens: np.ndarray) -> dict[int, np.ndarray]:
    backend = open_backend(Bundle.open(bundle), name="onnxruntime-cpu", max_seq=64, max_batch=1, threads=1)
    got = logits_by_position(backend, tokens)
    backend.close()
    return got


def in_a_process(model_type: str, tokenizer: str) -> Verdict:
    """`judge` in a process of its own, with a limit of time: a crash or a loop takes nothing else with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(SECONDS)
        with tempfile.TemporaryDirectory() as folder:
            try:
                verdict = judge(model_type, tokenizer, Path(folder))
            except BaseException as error:
                verdict = Verdict("crash", f"{type(error).__name__}: {one_line(error)}")
        os.write(writing, json.dumps(asdict(verdict)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    return Verdict(**json.loads(said)) if said else Verdict("timeout", f"no answer in {SECONDS} s")


def main() -> None:
    """Run the types named on the command line, or all."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    tiny = open_checkpoint("random:starling-tiny")
    tokenizer = tiny.tokenizer.tokenizer_json
    with tempfile.TemporaryDirectory() as folder:  # what the first export makes once, the children need not make again
        export_bundle(tiny, Path(folder) / "bundle", ExportOptions(check=False))
    lines = read_page(PAGE)
    for model_type in sys.argv[1:] or model_types():
        begin = time.monotonic()
        verdict = in_a_process(model_type, tokenizer)
        lines[model_type] = (verdict.verdict, verdict.why)
        print(f"{model_type}: {verdict.verdict} ({time.monotonic() - begin:.0f} s) {verdict.why[:300]}", flush=True)
        write_page(PAGE, {name: lines[name] for name in model_types() if name in lines})


if __name__ == "__main__":
    main()
