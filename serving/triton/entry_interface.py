"""What an entry is made of: its inputs and outputs, and how a request becomes a call and an answer its arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from numpy.typing import NDArray

from starling.serving.triton.entry_inputs import Inputs, Tensor
from starling.serving.triton.socket_messages import Delta, Job

Outputs: TypeAlias = dict[str, NDArray[Any]]


class Answer(Protocol):
    """Turns the deltas of a job's answers, in their order, into outputs."""

    def outputs(self, deltas: Sequence[Delta]) -> Outputs:
        """The arrays of one response, by name, of one delta for each answer."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request as it was understood. `prefix` comes before the text of an answer that is not streamed."""

    job: Job
    stream: bool
    answer: Answer
    prefix: str = ""


class Interface(Protocol):
    """A convention of names."""

    @property
    def batched(self) -> bool:
        """Whether tensors have Triton's batch axis in front."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All inputs, the unsupported ones too."""

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """All outputs."""

    def cancels(self, inputs: Inputs) -> bool:
        """Whether the request cancels the running ones of its own id, and asks for no text."""

    def read(self, inputs: Inputs, parameters: Mapping[str, Any]) -> Call:
        """The call of a request. Raises RequestError or SamplingError, naming the field."""
