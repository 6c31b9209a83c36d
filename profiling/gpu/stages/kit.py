"""What every stage is given: folders, where results go, and the card or, for a dry run, the CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starling.profiling.gpu.stages.machines import Machine
from starling.profiling.gpu.stages.results_file import Results


@dataclass(frozen=True, slots=True)
class Kit:
    """`graphs` is where `pack` put the bundles without their weights, `work` where they are filled."""

    work: Path
    graphs: Path
    results: Results
    machine: Machine

    def names(self, start: str) -> list[str]:
        """The bundles whose name begins so."""
        return sorted(folder.name for folder in self.graphs.glob(f"{start}*") if (folder / "bundle.json").is_file())

    def manifest(self, name: str) -> dict[str, Any]:
        """bundle.json of a bundle."""
        manifest: dict[str, Any] = json.loads((self.graphs / name / "bundle.json").read_text(encoding="utf-8"))
        return manifest

    def large(self, precision: str) -> str:
        """The bundle of the 7B shape; in a dry run the small one in its place."""
        return f"{'7b' if self.machine.is_card else 'tiny'}-{precision}"
