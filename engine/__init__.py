"""Run a bundle: tokenizer, sampling, backends and the decode loop. Imports neither torch, transformers nor onnx."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starling.engine.bundle.manifest import Bundle
    from starling.engine.chat_session import ChatSession
    from starling.engine.engine import Engine
    from starling.engine.errors import StarlingError
    from starling.engine.generation.results import GenerationChunk, GenerationResult, Timings
    from starling.engine.generation.sampling_params import SamplingParams
    from starling.engine.text.grammar import GrammarSpec

__all__ = [
    "Bundle",
    "ChatSession",
    "Engine",
    "GenerationChunk",
    "GenerationResult",
    "GrammarSpec",
    "SamplingParams",
    "StarlingError",
    "Timings",
]

# Loaded when first asked for: `starling --help` needs the errors, not NumPy.
_HOMES = {
    "Bundle": "bundle.manifest",
    "ChatSession": "chat_session",
    "Engine": "engine",
    "GenerationChunk": "generation.results",
    "GenerationResult": "generation.results",
    "GrammarSpec": "text.grammar",
    "SamplingParams": "generation.sampling_params",
    "StarlingError": "errors",
    "Timings": "generation.results",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
