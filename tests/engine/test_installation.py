"""Hints give the command for the installation at hand: the checkout, file or address that pip recorded (PEP 610)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import CHECKOUT

from starling.engine.installation import install_command, source

PROGRAM = (
    "from starling.engine.installation import install_command, source; "
    "print(install_command('gpu')); print(install_command(None, '--force-reinstall')); print(source())"
)
COMMIT = "0123456789abcdef"


def installed(folder: Path, recorded: dict[str, Any] | None) -> list[str]:
    """What an installation outside of a checkout says, of which pip recorded this."""
    for name in ("__init__.py", "engine/__init__.py", "engine/installation.py"):
        (folder / "starling" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "starling" / name).write_text((CHECKOUT / "starling" / name).read_text())
    metadata = folder / "starling_llm-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: starling-llm\nVersion: 0.1.0\n")
    if recorded is not None:
        (metadata / "direct_url.json").write_text(json.dumps(recorded))
    env = os.environ | {"PYTHONPATH": str(folder), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.splitlines()


def test_a_checkout_names_itself() -> None:
    assert install_command("export") == f"pip install --editable '{CHECKOUT}[export]'"
    assert source() == str(CHECKOUT)


@pytest.mark.parametrize(
    ("recorded", "with_extra", "again", "whence"),
    [
        (None, "'starling-llm[gpu]'", "--force-reinstall starling-llm", "starling-llm==0.1.0"),
        (
            {"url": "file:///home/me/my%20code/starling", "dir_info": {}},
            "'/home/me/my code/starling[gpu]'",
            "--force-reinstall '/home/me/my code/starling'",
            "/home/me/my code/starling",
        ),
        (
            {"url": "file:///src/starling", "dir_info": {"editable": True}},
            "--editable '/src/starling[gpu]'",
            "--force-reinstall --editable /src/starling",
            "/src/starling",
        ),
        (
            {"url": "file:///tmp/a.whl", "archive_info": {"hash": "sha256=00"}},
            "'/tmp/a.whl[gpu]'",
            "--force-reinstall /tmp/a.whl",
            "/tmp/a.whl",
        ),
        (
            {"url": "https://example.org/a.whl", "archive_info": {}},
            "'starling-llm[gpu] @ https://example.org/a.whl'",
            "--force-reinstall 'starling-llm @ https://example.org/a.whl'",
            "starling-llm @ https://example.org/a.whl",
        ),
        (
            {"url": "https://example.org/starling", "vcs_info": {"vcs": "git", "commit_id": COMMIT}},
            f"'starling-llm[gpu] @ git+https://example.org/starling@{COMMIT}'",
            f"--force-reinstall 'starling-llm @ git+https://example.org/starling@{COMMIT}'",
            f"starling-llm @ git+https://example.org/starling@{COMMIT}",
        ),
    ],
    ids=["index", "folder", "editable", "wheel", "address", "git"],
)
def test_an_installation_names_where_it_came_from(
    recorded: dict[str, Any] | None, with_extra: str, again: str, whence: str, tmp_path: Path
) -> None:
    assert installed(tmp_path, recorded) == [f"pip install {with_extra}", f"pip install {again}", whence]
