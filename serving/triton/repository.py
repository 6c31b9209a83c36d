"""Writes a Triton model repository over one bundle; it appears whole or not at all."""

from __future__ import annotations

import json
import shlex
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from starling import __version__
from starling.engine.batching.prefix_store import DEFAULT_PREFIX_CACHE
from starling.engine.bundle.manifest import Bundle
from starling.engine.errors import UserError
from starling.engine.installation import source
from starling.engine.names import Task
from starling.engine.whole_files import new_folder
from starling.serving.triton import engine_model, scoring_inputs
from starling.serving.triton.entry_interface import Interface
from starling.serving.triton.entry_model import ENGINE_MODEL
from starling.serving.triton.llmapi import LlmApiInterface
from starling.serving.triton.pbtxt import InstanceKind, ModelConfig
from starling.serving.triton.tensorrt_llm import TensorRtLlmInterface
from starling.serving.triton.vllm import VllmInterface

TENSORRT_LLM_MODEL = "ensemble"
LLMAPI_MODEL = "tensorrt_llm"
VLLM_MODEL = "vllm_model"
#: Its presence says that starling wrote the repository, which --force may replace.
MARK = "starling.json"
_VERSION = "1"
_MODEL_PY = '''"""{what}"""

try:
    from {module} import TritonPythonModel
except ModuleNotFoundError as error:
    raise ImportError(
        f"{{error}}: this Python has no Starling; make an environment with make_environment.sh and start the "
        "server with it, as README.md beside the models says"
    ) from None

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, slots=True)
class RepositoryOptions:
    """What the written repository serves, and how."""

    instance_kind: InstanceKind = "cpu"
    backend: str = "auto"
    #: A TensorRT engine of the bundle, None for the one that fits.
    engine: str | None = None
    max_batch: int = 8
    max_seq: int | None = None
    max_queue: int = 128
    threads: int | None = None
    #: Where drafts come from, None for none.
    speculation: str | None = None
    #: Bundle of a smaller model that drafts; it is copied or named as the bundle itself.
    draft: Path | None = None
    #: Bytes for known prefixes.
    prefix_cache: int = DEFAULT_PREFIX_CACHE
    #: Environment for EXECUTION_ENV_PATH: a folder with bin/activate, or a packed .tar.gz.
    environment: Path | None = None
    #: Put the bundle into the repository; otherwise it is named by its absolute path.
    copy: bool = False
    force: bool = False

    def parameters(self, task: Task) -> dict[str, str]:
        """The engine model's parameters in config.pbtxt, but for the bundle, which is for `task`."""
        given = {
            "backend": self.backend,
            "engine": self.engine,
            "max_batch": self.max_batch,
            "max_seq": self.max_seq,
            "queue_limit": self.max_queue,
            "threads": self.threads,
        }
        if task == "generate":
            given |= {"speculation": self.speculation, "prefix_cache": self.prefix_cache}
        return {name: str(value) for name, value in given.items() if value is not None}


def write_repository(bundle: Bundle, target: Path, options: RepositoryOptions) -> None:
    """Write the repository of `bundle` to `target`.

    Raises UserError where `target` is taken: without `force` by anything, with it by what starling did not
    write; StarlingError where the disk is full or the place cannot be written.
    """
    target = target.absolute()
    with new_folder(target, lambda: _check_target(target, options.force)) as draft:
        _write(bundle, draft, options)


def _check_target(target: Path, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not force:
        raise UserError(f"{target} exists already: give another place, or --force to replace it")
    if not (target / MARK).is_file():
        raise UserError(f"{target} is not a repository that Starling wrote (no {MARK}): --force does not replace it")


def _write(bundle: Bundle, folder: Path, options: RepositoryOptions) -> None:
    where = _place("bundle", bundle.folder, folder, options)
    parameters = {"bundle": where, **options.parameters(bundle.task), **_environment(options)}
    if options.draft is not None:
        parameters["draft"] = _place("draft", options.draft, folder, options)
    if bundle.task == "generate":
        _write_generating(folder, parameters, options)
    else:
        _write_scoring(folder, bundle, parameters, options)
    _write_texts(folder, bundle, where)


def _place(name: str, source: Path, folder: Path, options: RepositoryOptions) -> str:
    """Where the engine model finds a bundle: its own path, or the folder `name` that it was copied to."""
    if not options.copy:
        return str(source.resolve())
    shutil.copytree(source, folder / ENGINE_MODEL / _VERSION / name)
    return name


def _write_scoring(folder: Path, bundle: Bundle, parameters: Mapping[str, str], options: RepositoryOptions) -> None:
    what = "Scores texts." if bundle.task == "score" else "Embeds texts."
    inputs, outputs = scoring_inputs.INPUTS, scoring_inputs.outputs_of(bundle)
    kind = options.instance_kind
    config = ModelConfig(ENGINE_MODEL, what, inputs, outputs, kind=kind, parameters=parameters)
    _write_model(folder, config, "scoring_model")


def _write_generating(folder: Path, parameters: Mapping[str, str], options: RepositoryOptions) -> None:
    _write_model(
        folder,
        ModelConfig(
            ENGINE_MODEL,
            "Holds the engine. Clients use the entries ensemble, tensorrt_llm and vllm_model; this tells its figures:\n"
            'curl -d \'{"command": "stats"}\' localhost:8000/v2/models/starling/generate',
            engine_model.INPUTS,
            engine_model.OUTPUTS,
            kind=options.instance_kind,
            parameters=parameters,
        ),
        "engine_model",
    )
    for name, comment, interface, module in _ENTRIES:
        config = ModelConfig(
            name,
            comment,
            interface.inputs,
            interface.outputs,
            batched=interface.batched,
            decoupled=True,
            parameters=_environment(options),
        )
        _write_model(folder, config, module)


_ENTRIES: tuple[tuple[str, str, Interface, str], ...] = (
    (TENSORRT_LLM_MODEL, "The names of TensorRT-LLM's ensemble.", TensorRtLlmInterface(), "entry_tensorrt_llm"),
    (LLMAPI_MODEL, "The names of TensorRT-LLM's llmapi model.", LlmApiInterface(), "entry_llmapi"),
    (VLLM_MODEL, "The names of Triton's vLLM backend.", VllmInterface(), "entry_vllm"),
)


def _environment(options: RepositoryOptions) -> dict[str, str]:
    if options.environment is None:
        return {}
    return {"EXECUTION_ENV_PATH": str(options.environment.absolute())}


def _write_model(folder: Path, config: ModelConfig, module: str) -> None:
    model = folder / config.name / _VERSION
    model.mkdir(parents=True, exist_ok=True)
    (model.parent / "config.pbtxt").write_text(config.text(), encoding="utf-8")
    what = config.comment.splitlines()[0]
    text = _MODEL_PY.format(what=what, module=f"starling.serving.triton.{module}")
    (model / "model.py").write_text(text, encoding="utf-8")


def _write_texts(folder: Path, bundle: Bundle, where: str) -> None:
    templates = files("starling.serving.triton").joinpath("templates")
    values = {
        **_readme_parts(templates, bundle),
        "version": __version__,
        "bundle": "starling/1/bundle, inside this repository" if where == "bundle" else where,
        "model": str(bundle.source.get("name")),
        "source": shlex.quote(source()),
    }
    for template in templates.iterdir():
        if template.is_dir():
            continue
        file = folder / template.name
        file.write_text(_filled(template.read_text(encoding="utf-8"), values), encoding="utf-8")
        if file.suffix == ".sh":
            file.chmod(file.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    (folder / MARK).write_text(json.dumps({"starling_version": values["version"]}) + "\n", encoding="utf-8")


def _readme_parts(templates: Traversable, bundle: Bundle) -> dict[str, str]:
    """What README.md says of the models of a bundle that generates, or of one that does not."""
    folder = templates.joinpath("generating" if bundle.task == "generate" else "scoring")
    parts = {name: folder.joinpath(f"{name}.md").read_text(encoding="utf-8").strip() for name in ("models", "ask")}
    numbers = scoring_inputs.NUMBERS.get(bundle.task, "")
    return {name: _filled(text, {"numbers": numbers}) for name, text in parts.items()}


def _filled(text: str, values: Mapping[str, str]) -> str:
    """The text with each @{name} replaced; ${name} is the shell's."""
    return reduce(lambda filled, item: filled.replace(f"@{{{item[0]}}}", item[1]), values.items(), text)
