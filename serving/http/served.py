"""What a server has behind it: a model that generates, one that scores or embeds, or both, each with its own loop."""

from __future__ import annotations

from dataclasses import dataclass

from starling.serving.api.api_errors import ApiError
from starling.serving.http.scoring_service import ScoringService, no_such_model
from starling.serving.http.service import Service
from starling.serving.metrics.prometheus import export_metrics


@dataclass(slots=True)
class Served:
    """At least one of the two. They end together."""

    generating: Service | None
    scoring: ScoringService | None

    def no_generator(self) -> ApiError:
        """For a request to generate, where no model does."""
        assert self.scoring is not None
        task = self.scoring.engine.bundle.task
        return no_such_model(f"no model here generates text: {self.scoring.models[0]} is for the task {task}")

    @property
    def models(self) -> dict[str, int]:
        """The names of all models, and the longest sequence that each takes."""
        found: dict[str, int] = {}
        if self.generating is not None:
            found |= dict.fromkeys(self.generating.limits.models, self.generating.limits.max_seq)
        if self.scoring is not None:
            found |= dict.fromkeys(self.scoring.models, self.scoring.engine.max_seq)
        return found

    def export_metrics(self) -> bytes:
        """The metrics of all models, in Prometheus' text format."""
        return export_metrics([one.metrics for one in self._both()])

    @property
    def draining(self) -> bool:
        """Whether nothing new begins."""
        return any(one.draining for one in self._both())

    def drain(self) -> None:
        """Begin nothing new."""
        for one in self._both():
            one.draining = True

    @property
    def failed(self) -> bool:
        """Whether a model's thread has ended by a failure."""
        return any(one.failed for one in self._both())

    def cancel_all(self) -> None:
        """End every request where it is."""
        for one in self._both():
            one.cancel_all()

    def close(self) -> None:
        """End the workers."""
        for one in self._both():
            one.close()

    def _both(self) -> list[Service | ScoringService]:
        return [one for one in (self.generating, self.scoring) if one is not None]
