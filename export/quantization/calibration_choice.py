"""What a model is calibrated on, as the user asks for it. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path

from starling.engine.errors import UserError

DEFAULT_TOKENS = 4096
#: In place of a file: no calibration.
NONE = Path("none")


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text of a calibration: a file (None: the built-in text; NONE: no calibration), and how much of it."""

    file: Path | None = None
    tokens: int = DEFAULT_TOKENS

    @property
    def is_off(self) -> bool:
        """Whether weights are rounded without a look at what they are multiplied with."""
        return self.file == NONE

    @property
    def name(self) -> str:
        """The text's name in bundle.json."""
        return "built in" if self.file is None else self.file.name

    def require(self, scheme: str) -> None:
        """Raise UserError where `scheme` cannot do without and the user wants none."""
        if self.is_off:
            raise UserError(f"{scheme} quantizes activations, whose range calibration finds: give --calibration a text")
