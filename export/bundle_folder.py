"""Write a bundle folder so that it is there whole or not at all."""

import hashlib
import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starling.engine.errors import CheckpointError, StarlingError, UserError
from starling.engine.names import EXTRA_TEMPLATES
from starling.engine.untrusted_files import is_file_name
from starling.engine.whole_files import new_folder

if TYPE_CHECKING:
    from starling.export.checkpoints.checkpoint import TokenizerFiles


def new_bundle_folder(target: Path, *, force: bool) -> AbstractContextManager[Path]:
    """A working folder that becomes `target` when the block ends well: see `whole_files.new_folder`.

    Raises:
        UserError: `target` exists and `force` is not set, or is not a bundle and would be overwritten.
        StarlingError: the disk is full or the place cannot be written.
    """
    return new_folder(target, lambda: check_target(target, force=force))


def check_target(target: Path, *, force: bool) -> None:
    """Raise UserError where a bundle may not be written to `target`: see `new_bundle_folder`."""
    if not target.exists():
        _check_parents(target)
        return
    if not force:
        raise UserError(f"{target} exists; give another folder, or --force to replace the bundle in it")
    if target.is_file() or (any(target.iterdir()) and not (target / "bundle.json").is_file()):
        raise UserError(f"{target} is not a bundle; --force replaces bundles only, so choose another folder")


def _check_parents(target: Path) -> None:
    """Raise UserError where the folders that `target` is to be in cannot be made."""
    there = next(folder for folder in target.absolute().parents if folder.exists())
    if not there.is_dir():
        raise UserError(f"{target} cannot be made: {there} is a file; give another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{target} cannot be made: {there} may not be written to; give another folder")


def check_space(folder: Path, needed: int) -> None:
    """Raise StarlingError where the file system of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StarlingError(
            f"not enough disk space in {folder.parent}: the bundle needs {needed / 1e9:.2f} GB, "
            f"{free / 1e9:.2f} GB are free"
        )


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON file as people read it."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, files: "TokenizerFiles", generation: dict[str, Any]) -> None:
    """Write the tokenizer, its chat templates and the generation defaults."""
    (folder / "tokenizer.json").write_text(files.tokenizer_json, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", files.tokenizer_config)
    write_json(folder / "special_tokens_map.json", files.special_tokens_map)
    write_json(folder / "generation_config.json", generation)
    if files.chat_template is not None:
        (folder / "chat_template.jinja").write_text(files.chat_template, encoding="utf-8")
    if files.additional_chat_templates:
        (folder / EXTRA_TEMPLATES).mkdir()
    for name, template in files.additional_chat_templates.items():
        if not is_file_name(name):
            raise CheckpointError(f"a chat template is called {name[:80]!r}: use letters, digits and _ . + -")
        (folder / EXTRA_TEMPLATES / f"{name}.jinja").write_text(template, encoding="utf-8")


def file_entry(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as bundle.json lists it."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
