"""Which choices of a token a graph can make itself, and what it has to be told for them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from starling.engine.generation.sampler import SMALLEST_TEMPERATURE, SamplingParams
from starling.engine.names import TOP_K_LIMIT


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """How a row's tokens are chosen on the device: the likeliest one where `top_k` is 1, else drawn."""

    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 1.0
    #: None draws a fresh one.
    seed: int | None = None

    def noise(self, count: int) -> npt.NDArray[np.float32]:
        """The uniform numbers [count] in [0, 1) of the first `count` draws: those of the host's sampler."""
        drawn = np.random.default_rng(self.seed).random(count).astype(np.float32)
        # Rounding to float32 may give 1, which would draw behind the last token.
        below_one: npt.NDArray[np.float32] = np.minimum(drawn, np.nextafter(np.float32(1), np.float32(0)))
        return below_one


GREEDY = DeviceChoice()


def device_choice(params: SamplingParams) -> DeviceChoice | None:
    """The choice that `params` ask for, or None where only the host can make it."""
    if params.is_greedy:
        return GREEDY
    penalized = params.repetition_penalty != 1 or params.min_p > 0
    if penalized or params.temperature == 0 or not 1 <= params.top_k <= TOP_K_LIMIT:
        return None
    return DeviceChoice(max(params.temperature, SMALLEST_TEMPERATURE), params.top_k, params.top_p, params.seed)
