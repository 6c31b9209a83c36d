"""Types the commands of a document into one shell, in their order, as its reader would in a folder of their own.

Three things differ from what a reader types: a server runs in the background until another takes its port or the
document ends; the ports that the document names are replaced by free ones, here and nowhere else; and what the tests
have made already, by the same code with the same settings, is put in place and not made again (`made`).
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from document_blocks import Block, Command
from triton_server import answers

#: A command that does not end by itself.
_SERVER = re.compile(r"\bstarling serve (?!.*--help)|\bstart\.sh\b")
_PORT = re.compile(r"((?:127\.0\.0\.1|localhost|0\.0\.0\.0):|--port[ =])(\d{4,5})\b")
#: Ports that commands take by default, by the name of start.sh's variable.
DEFAULT_PORTS = {"HTTP": 8000, "GRPC": 8001, "METRICS": 8002}
READY_PATHS = ("/ready", "/v2/health/ready")
COMMAND_S, READY_S, END_S = 600, 90, 60

#: What a reader has at hand: files that documents name without showing them, and a line for what reads the terminal.
LINE = "What is the capital of South Korea?\n"
FILES = {
    "questions.jsonl": '{"id": "q7", "prompt": "The largest city in Japan is", "max_tokens": 8}\n'
    '{"messages": [{"role": "user", "content": "What is the capital of South Korea?"}]}\n',
    "book.txt": "It was a bright cold day in the village, and the clock on the church struck nine. " * 60,
    "edit-this-code.txt": "Repeat this code:\n\ndef add(left, right):\n    return left + right\n",
    "task.txt": "Write a function that adds two numbers.\n",
    "prompt.txt": "The largest city in Japan is",
    "keys.txt": "a-key-of-the-reader\n",
}


class Reader:
    """A shell in `folder` whose `starling` and `python` are those of `programs`."""

    def __init__(
        self,
        folder: Path,
        notes: Path,
        *,
        programs: Path = Path(sys.executable).parent,
        made: Callable[[str, Path], bool] = lambda command, folder: False,
        env: Mapping[str, str] = {},
    ) -> None:
        """`notes` is an empty folder for outputs and logs.

        `made` puts what a command would make into the folder, and says whether it could.
        """
        self.folder, self.notes, self._made = folder, notes, made
        self._ports: dict[int, int] = {}
        self._servers: dict[int, int] = {}
        self._count = 0
        for name, text in FILES.items():
            (folder / name).write_text(text)
        (notes / "typed").write_text(LINE)
        (notes / ".curlrc").write_text("silent\nshow-error\n")  # a terminal shows no progress either
        path = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "CURL_HOME": str(notes)}
        self._shell = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=folder,
            env={**os.environ, **path, **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._tell("set -o pipefail -m")

    def run(self, block: Block, command: Command) -> str:
        """Run one command of a block; what it printed. Fails where its exit code is not 0 or its output is another."""
        if block.language == "json":
            return self._check_json(block)
        if block.language == "python":
            script = self.notes / f"block-{block.line}.py"
            script.write_text(self._with_ports(block.text))
            return self._run_to_end(block, f"python {script}")
        if self._made(command.text, self.folder):
            return ""
        if _SERVER.search(command.text):
            output = self._serve(block, command.text)
        else:
            output = self._run_to_end(block, self._with_ports(command.text))
        if command.output:
            check_output(block, command, self._with_documented_ports(output), whole=not _SERVER.search(command.text))
        return output

    def close(self) -> None:
        """End the servers, then the shell and whatever it left."""
        try:
            for port in list(self._servers):
                self._end_server(port)
        finally:
            self._shell.kill()
            self._shell.communicate()

    def _run_to_end(self, block: Block, text: str) -> str:
        output = self._next_file("output")
        self._tell(f"{{ {text}\n}} <{self.notes}/typed >{output} 2>&1; echo $?")
        code = self._hear()
        printed = output.read_text(errors="replace")
        assert code == "0", f"{block.place}: exit code {code} of: {text}\n{printed[-4000:]}"
        return printed

    def _serve(self, block: Block, text: str) -> str:
        """Start a server; what it has logged by the time it is ready."""
        named = re.search(r"--port[ =](\d+)", text)
        documented = int(named[1]) if named else DEFAULT_PORTS["HTTP"]
        self._end_server(documented)
        log, script = self._next_file("log"), self._next_file("server")
        script.write_text(self._server_command(text, named=named is not None))
        log.touch()
        self._tell(f'bash -c "$(<{script})" </dev/null >{log} 2>&1 & echo $!')
        process = int(self._hear())
        if not _gets_ready(self._port(documented), process):
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            raise AssertionError(f"{block.place}: not ready: {text}\n{log.read_text(errors='replace')[-4000:]}")
        self._servers[documented] = process
        return log.read_text(errors="replace")

    def _server_command(self, text: str, *, named: bool) -> str:
        """The command with free ports, given where it would take its usual ones."""
        text = self._with_ports(text)
        if "start.sh" in text:
            return " ".join(f"{name}={self._port(usual)}" for name, usual in DEFAULT_PORTS.items()) + f" {text}"
        port = self._port(DEFAULT_PORTS["HTTP"])
        return text if named else text.replace("starling serve", f"starling serve --port {port}", 1)

    def _end_server(self, documented: int) -> None:
        """SIGTERM to the server of this port, which must end by itself; then its port is another one."""
        process = self._servers.pop(documented, None)
        if process is None:
            return
        self._ports.pop(documented, None)
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGTERM)
        self._tell(f"wait {process}; echo $?")
        try:
            code = self._hear(END_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        assert code in ("0", "143"), f"a server ended with {code} on SIGTERM"

    def _check_json(self, block: Block) -> str:
        """Read the documents of a block; they have the form of the file that it is said to show."""
        shown = [json.loads(line) for line in block.text.splitlines()] if _is_lines(block.text) else None
        documents = shown or [json.loads(block.text)]
        if block.shows is not None:
            real = json.loads((self.folder / block.shows).read_text().splitlines()[0])
            for document in documents:
                assert _form(document) == _form(real), f"{block.place}: {block.shows} has {real}"
        return ""

    def _with_ports(self, text: str) -> str:
        return _PORT.sub(lambda found: f"{found[1]}{self._port(int(found[2]))}", text)

    def _with_documented_ports(self, text: str) -> str:
        back = {free: documented for documented, free in self._ports.items()}
        return _PORT.sub(lambda found: f"{found[1]}{back.get(int(found[2]), found[2])}", text)

    def _port(self, documented: int) -> int:
        """The free port that stands for one of the document."""
        if documented not in self._ports:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                self._ports[documented] = listener.getsockname()[1]
        return self._ports[documented]

    def _next_file(self, kind: str) -> Path:
        self._count += 1
        return self.notes / f"{self._count}.{kind}"

    def _tell(self, text: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(text + "\n")
        self._shell.stdin.flush()

    def _hear(self, seconds: float = COMMAND_S) -> str:
        """The shell's next line; fails where it takes longer."""
        assert self._shell.stdout is not None
        assert select.select([self._shell.stdout], [], [], seconds)[0], f"no end within {seconds} s"
        return self._shell.stdout.readline().strip()


@contextmanager
def reading(folder: Path, notes: Path, **how: Any) -> Iterator[Reader]:
    """A reader for the length of the block."""
    folder.mkdir(exist_ok=True)
    notes.mkdir(exist_ok=True)
    reader = Reader(folder, notes, **how)
    try:
        yield reader
    finally:
        reader.close()


def check_output(block: Block, command: Command, printed: str, *, whole: bool) -> None:
    """Fail unless the command printed what the document shows: all of it, or these lines. `…` is anything in a line."""
    shown = [re.escape(line).replace("…", ".*") for line in command.output.splitlines() if line]
    real = [line.rstrip() for line in printed.splitlines() if line.strip()]
    where = f"{block.place}: {command.text}\nprinted:\n{printed[-4000:]}"
    if whole:
        assert len(shown) == len(real), where
    for line in shown:
        while real and not re.fullmatch(line, real[0]):
            assert not whole, f"{where}\nwhich is not {line}"
            real.pop(0)
        assert real, f"{where}\nin which this line is not: {line}"
        real.pop(0)


def _is_lines(text: str) -> bool:
    """Whether every line is a document of its own."""
    try:
        return all(isinstance(json.loads(line), dict) for line in text.splitlines())
    except json.JSONDecodeError:
        return False


def _form(document: Any) -> Any:
    """The names and types of a JSON document."""
    if isinstance(document, dict):
        return {name: _form(value) for name, value in document.items()}
    if isinstance(document, list):
        return [_form(value) for value in document[:1]]
    return "number" if isinstance(document, int | float) and not isinstance(document, bool) else type(document).__name__


def _gets_ready(port: int, process: int) -> bool:
    """Whether a server takes requests before it ends or its time is up."""
    end = time.monotonic() + READY_S
    while not any(answers(f"http://127.0.0.1:{port}{path}") for path in READY_PATHS):
        if time.monotonic() > end or not Path(f"/proc/{process}").exists():
            return False
        time.sleep(0.1)
    return True
