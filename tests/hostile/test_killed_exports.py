"""`starling export --force` over a bundle, killed at any moment, leaves a whole bundle, and the next run cleans up."""

import random
import subprocess
import time
from pathlib import Path

import pytest
from command_line import starling_command, succeed

from starling.engine.bundle.manifest import Bundle
from starling.export.check.sample_texts import CALIBRATION

KILLS = 2


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), ("--quant", "int4", "--calibration", CALIBRATION)], ids=["fp32", "int4"])
def test_a_killed_export_costs_no_bundle(settings: tuple[str | Path, ...], tmp_path: Path, rounds: int) -> None:
    out, moments = tmp_path / "out", random.Random(rounds)
    export = ("export", "random:starling-tiny", out, *settings)
    succeed(*export)
    begin = time.monotonic()
    succeed(*export, "--force")
    whole = time.monotonic() - begin
    for number in range(KILLS * rounds):
        # Every other one in the last fifth: where the weights are written and the folder is put in place.
        moment = whole * (moments.random() if number % 2 else moments.uniform(0.8, 1.1))
        with subprocess.Popen(starling_command(*export, "--force"), stderr=subprocess.DEVNULL) as process:
            time.sleep(moment)
            process.kill()
        bundle = Bundle.open(out, verify=True)
        assert bundle.architecture.layers == 2
    succeed(*export, "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
