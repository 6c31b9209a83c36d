"""TensorRT for RTX and TensorRT 11 as one: what Starling asks of either package, and all that differs between them.

`tensorrt_rtx` builds plans ahead of time for several kinds of GPU, without one; `tensorrt` builds for the GPU that is
present and has not been run by us.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, get_args

from starling.engine.errors import BackendError
from starling.engine.installation import install_command

RuntimeName = Literal["tensorrt-rtx", "tensorrt"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
TITLES: dict[RuntimeName, str] = {"tensorrt-rtx": "TensorRT for RTX", "tensorrt": "TensorRT"}
_MODULES: dict[RuntimeName, str] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}
_KEPT_MESSAGES = 64
#: TensorRT for RTX names it, but NVIDIA's support matrix has no product of it (7.5, 8.6, 8.9, 12.0 and 12.1 are there).
_UNSUPPORTED = frozenset({"sm80"})


@dataclass(frozen=True, slots=True)
class Library:
    """One of the two packages. `module` is its Python module, `messages` what it last warned of or complained about."""

    name: RuntimeName
    version: str
    module: Any
    #: An ILogger of the module, for Builder, OnnxParser and Runtime.
    logger: Any
    messages: deque[str]

    @property
    def title(self) -> str:
        """Name and version as people say them."""
        return f"{TITLES[self.name]} {self.version}"

    @property
    def targets(self) -> tuple[str, ...] | None:
        """Compute capabilities that it builds for ahead of time, such as "sm89"; None: for the GPU that is present."""
        if self.name == "tensorrt":
            return None
        members = self.module.ComputeCapability.__members__
        return tuple(name.lower() for name in members if name.startswith("SM") and name.lower() not in _UNSUPPORTED)

    @property
    def has_timing_cache(self) -> bool:
        """Whether timings of one build serve the next: TensorRT for RTX times nothing when it builds."""
        return self.name == "tensorrt"

    def set_targets(self, config: Any, targets: Sequence[str]) -> None:
        """Tell a builder configuration what to build for; `targets` come from `resolve_targets`."""
        if self.targets is None:
            return
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(getattr(self.module.ComputeCapability, target.upper()), index)

    def as_kind(self, layer: Any, kind: str) -> Any:
        """`layer` of a network as the layer class called `kind`: the API hands out plain ILayer objects only."""
        layer.__class__ = getattr(self.module, kind)
        return layer

    def last_message(self) -> str:
        """The newest complaint, in one line."""
        return " ".join(self.messages[-1].split()) if self.messages else "it gave no reason"


def layers_of(network: Any) -> Iterator[Any]:
    """The layers of a network definition."""
    return (network.get_layer(index) for index in range(network.num_layers))


def inputs_of(network: Any) -> Iterator[Any]:
    """The input tensors of a network definition."""
    return (network.get_input(index) for index in range(network.num_inputs))


def outputs_of(network: Any) -> Iterator[Any]:
    """The output tensors of a network definition."""
    return (network.get_output(index) for index in range(network.num_outputs))


def load_library(name: str | None = None) -> Library:
    """Import the package of the runtime called `name`; None takes the first of RUNTIMES that is installed.

    Raises BackendError where it is unknown, not installed, or cannot be loaded.
    """
    if name is None:
        return _first_installed()
    for known in RUNTIMES:
        if name == known:
            return _load(known)
    raise BackendError(f"unknown runtime {name!r}; choose one of {', '.join(RUNTIMES)}")


def _first_installed() -> Library:
    for name in RUNTIMES:
        try:
            return _load(name)
        except BackendError as error:
            if not isinstance(error.__cause__, ModuleNotFoundError):
                raise
    raise BackendError(
        f"neither TensorRT for RTX nor TensorRT is installed: {install_command('tensorrt-rtx')} (GeForce and RTX "
        f"cards; builds without a GPU) or {install_command('tensorrt')} (datacenter cards)"
    )


def _load(name: RuntimeName) -> Library:
    try:
        module = import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        raise BackendError(f"{TITLES[name]} is not installed ({error}): {install_command(name)}") from error
    except (ImportError, OSError) as error:
        raise BackendError(
            f"{TITLES[name]} cannot be loaded ({error}): {install_command(name, '--force-reinstall')}"
        ) from error
    messages: deque[str] = deque(maxlen=_KEPT_MESSAGES)
    return Library(name, module.__version__, module, _logger(module, messages), messages)


def _logger(module: Any, messages: deque[str]) -> Any:
    """A logger that keeps warnings and errors instead of printing them."""
    worst_kept = int(module.ILogger.Severity.WARNING)

    class Keeper(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= worst_kept:
                messages.append(message)

    return Keeper()
