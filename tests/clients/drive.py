"""Drives `starling serve` with clients that others wrote, each in an environment of its own: `make test-clients`.

    python tests/clients/drive.py BUNDLE [NAME ...]

Each client asks a real server, and its answers are compared with what plain HTTP got for the same requests. The
environments are made once, below build/clients; node and npm must be there for `openai_npm`. A client that cannot be
installed is an error, not a success.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "helpers"))

from http_server import MODEL, Server, serving  # noqa: E402

BUILD = HERE.parents[1] / "build" / "clients"
INSTALL_S, RUN_S = 1200, 300
#: Keeps pip from CUDA's packages.
CONSTRAINTS = "torch==2.13.0\n"


@dataclass(frozen=True)
class Client:
    """A script here, run with what it needs."""

    script: str
    packages: tuple[str, ...]

    def prepare(self) -> list[str]:
        """Make its environment; the command that runs it."""
        folder = BUILD / Path(self.script).stem
        if self.script.endswith(".mjs"):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "node_modules").is_dir():
                _install(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), *self.packages])
            # Modules are looked for beside the script.
            script = folder / self.script
            script.write_bytes((HERE / self.script).read_bytes())
            return ["node", str(script)]
        done = folder / "installed"
        python = folder / "bin" / "python"
        if not done.is_file():
            _install([sys.executable, "-m", "venv", str(folder)])
            (folder / "constraints.txt").write_text(CONSTRAINTS, encoding="utf-8")
            _install([str(python), "-m", "pip", "install", "-q", "-c", str(folder / "constraints.txt"), *self.packages])
            done.touch()
        return [str(python), str(HERE / self.script)]


CLIENTS = {
    "openai_npm": Client("openai_npm.mjs", ("openai@6",)),
    "langchain": Client("langchain_client.py", ("langchain-openai>=1",)),
    "litellm": Client("litellm_client.py", ("litellm>=1.80",)),
    "aiperf": Client("aiperf_client.py", ("aiperf>=0.13",)),
}


def main() -> int:
    """Run the clients that were named, or all; 0 where every one passed."""
    bundle, names = Path(sys.argv[1]), sys.argv[2:] or list(CLIENTS)
    commands = {name: CLIENTS[name].prepare() for name in names}
    failed = []
    with serving(bundle, "--max-batch", "4", "--max-seq", "1024") as server:
        environment = {**os.environ, "STARLING_CLIENT": json.dumps(_facts(server, bundle))}
        for name, command in commands.items():
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False)
            print(f"{name:12s} {'passed' if ran.returncode == 0 else 'FAILED'}  {_last_line(ran.stdout)}", flush=True)
            if ran.returncode != 0:
                failed.append(name)
                print(ran.stdout[-2000:], ran.stderr[-4000:], sep="\n", file=sys.stderr)
        running = server.metric("vllm:num_requests_running") + server.metric("vllm:num_requests_waiting")
        assert running == 0, f"{running} requests are left"
    return 1 if failed else 0


def _facts(server: Server, bundle: Path) -> dict[str, Any]:
    """What every script is told, with the answers to its requests by plain HTTP."""
    prompts = ["The largest city in Japan is", "Water boils at"]
    messages = [{"role": "user", "content": "Name a colour."}]
    asked = {"model": MODEL, "temperature": 0, "max_tokens": 12}
    texts = [_post(server, "/v1/completions", asked | {"prompt": prompt})["choices"][0]["text"] for prompt in prompts]
    chat = _post(server, "/v1/chat/completions", asked | {"messages": messages})["choices"][0]["message"]["content"]
    return {
        "url": f"http://127.0.0.1:{server.port}",
        "model": MODEL,
        "bundle": str(bundle.resolve()),
        "prompts": prompts,
        "texts": texts,
        "messages": messages,
        "chat": chat,
        "max_tokens": 12,
    }


def _post(server: Server, path: str, body: dict[str, Any]) -> Any:
    status, _, content = server.request("POST", path, body)
    assert status == 200, content
    return json.loads(content)


def _install(command: list[str]) -> None:
    ran = subprocess.run(command, timeout=INSTALL_S, capture_output=True, text=True, check=False)
    if ran.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{ran.stderr[-4000:]}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    sys.exit(main())
