"""`starling doctor`: what is installed here, what each part makes possible, and what to install for the rest."""

from __future__ import annotations

from typing import Any

import click

from starling.cli.shared.options import json_option
from starling.cli.shared.output import human_bytes, print_hanging, print_json, print_rows

GOOD, ABSENT = "green", "yellow"


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Show versions, processor, ONNX Runtime's providers, GPUs and optional packages, and what each makes possible.

    Nothing is downloaded and no model hub is asked.

    \b
    Examples:
      starling doctor
      starling doctor --json
    """
    from starling.profiling.machine.installed import describe_environment

    environment = describe_environment()
    if as_json:
        print_json(environment)
        return
    _print_versions(environment)
    for line in environment["findings"]:
        mark = click.style("yes" if line["ok"] else "no ", fg=GOOD if line["ok"] else ABSENT, bold=True)
        print_hanging(mark, len("yes"), f"{line['subject']}: {line['text']}")


def _print_versions(environment: dict[str, Any]) -> None:
    machine = environment["machine"]
    isa = " ".join(machine["isa"]) or "no known ISA"
    rows = {
        "starling": f"{environment['starling']}, Python {environment['python']}, {environment['system']}",
        "processor": f"{machine['cpu']}, {machine['physical_cores']} cores, {isa}",
        "memory": f"{human_bytes(machine['memory_bytes'])}, {human_bytes(machine['memory_available_bytes'])} free",
        "onnxruntime": _runtime(environment["onnxruntime"]),
        "GPU": ", ".join(gpu["name"] for gpu in environment["gpus"]) or "none that nvidia-smi shows",
    }
    print_rows(rows.items())
    click.echo()


def _runtime(runtime: dict[str, Any]) -> str:
    if runtime["version"] is None:
        return f"not usable: {runtime['error']}"
    packages = ", ".join(f"{name} {version}" for name, version in runtime["packages"].items())
    return f"{packages or runtime['version']}, providers {', '.join(runtime['providers'])}"
