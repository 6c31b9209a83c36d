"""Starling's own engine as a worker, through the Python API that everybody uses."""

from collections.abc import Iterator
from importlib.metadata import version

from starling.engine.engine import Engine
from starling.engine.sampling import SamplingParams


class Worker:
    """A bundle, run greedily by the engine."""

    def __init__(self) -> None:
        self._engine: Engine | None = None

    def open(self, model: str, threads: int, capacity: int) -> dict[str, str]:
        self._engine = Engine(model, max_seq=capacity, threads=threads)
        return {name: version(name) for name in ("starling-llm", "onnxruntime", "numpy")}

    def start(self, prompt: list[int], new_tokens: int) -> Iterator[int]:
        if self._engine is None:
            raise RuntimeError("run before open")
        return _tokens(self._engine, prompt, SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True))


def _tokens(engine: Engine, prompt: list[int], params: SamplingParams) -> Iterator[int]:
    for chunk in engine.stream(prompt, params):
        if chunk.token is not None:
            yield chunk.token
