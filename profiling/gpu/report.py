"""From the lines of a run on a card to the file of measurements that is kept, and from that to the tables of the docs.

    python -m starling.profiling.gpu.report add gpu-results/results.jsonl --into profiling/results/cuda-h200.json \
        --label after --what "…"
    python -m starling.profiling.gpu.report tables profiling/results/cuda-h200.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from starling.engine.errors import StarlingError, UserError
from starling.profiling.gpu.report_tables import all_tables
from starling.profiling.gpu.stages.results_file import read_results

FORMAT, FORMAT_VERSION = "starling-cuda-measurements", 2
_LEFT_OUT = ("at_s",)
_BOOKKEEPING = ("environment", "weights")


def as_run(lines: list[dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run's lines; `given` are its label and words, and what the lines do not tell.

    Raises UserError where neither tells the commit, or the bandwidth that shares are to be of.
    """
    about = next((line for line in lines if line["stage"] == "environment" and "device" in line), {})
    kit = about.get("kit") or {}
    known = {
        "commit": kit.get("commit"),
        "date": about.get("date", "")[:10] or None,
        "device": about.get("device"),
        "driver": about.get("driver"),
        "versions": about.get("versions"),
        "read_TBs": next((line["read_TBs"] for line in lines if line.get("read_TBs")), None),
        "defaults": _defaults(lines),
    }
    run = {**known, **{name: value for name, value in given.items() if value is not None}}
    for name in ("label", "commit", "date", "read_TBs"):
        if not run.get(name):
            raise UserError(f"the results do not tell {name}: give --{name.replace('_', '-').lower()}")
    measurements = [kept for line in lines if (kept := _kept(line, run["read_TBs"])) is not None]
    return {**run, "measurements": measurements}


def _defaults(lines: list[dict[str, Any]]) -> dict[str, str]:
    """The label of what is on by default, by stage: the first one that was measured."""
    found: dict[str, str] = {}
    for line in lines:
        if line.get("how") == "starling" and line["stage"] in ("fp16", "int8"):
            found.setdefault(line["stage"], line["label"])
    return found


def _kept(line: dict[str, Any], read_TBs: float) -> dict[str, Any] | None:
    """A line with its share of the bandwidth; None for what measures nothing."""
    if line["stage"] in _BOOKKEEPING or "done_s" in line:
        return None
    kept = {name: value for name, value in line.items() if name not in _LEFT_OUT}
    if "step_bytes" in line:
        kept["share"] = round(line["step_bytes"] / line["step_ms"] / 1e9 / read_TBs, 3)
    elif "tbs" in line:
        kept["share"] = round(line["tbs"] / read_TBs, 3)
    return kept


def add(document: dict[str, Any], run: dict[str, Any]) -> None:
    """Put the run after the others; one of the same label is replaced."""
    document["runs"] = [each for each in document["runs"] if each["label"] != run["label"]] + [run]


def read_document(file: Path) -> dict[str, Any]:
    """The measurements of a card, an empty document where there is no file. Raises UserError for another format."""
    if not file.exists():
        return {"format": FORMAT, "format_version": FORMAT_VERSION, "notes": [], "runs": []}
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if (document.get("format"), document.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise UserError(f"{file} is not of format {FORMAT} {FORMAT_VERSION}")
    return document


def write_document(file: Path, document: dict[str, Any]) -> None:
    """A measurement a line, so that a change shows what changed."""
    runs = []
    for run in document["runs"]:
        head = json.dumps({key: value for key, value in run.items() if key != "measurements"}, indent=1)
        body = ",\n".join(f"   {json.dumps(line)}" for line in run["measurements"])
        runs.append(f'{head.removesuffix("}").rstrip()},\n "measurements": [\n{body}\n ]\n}}')
    head = json.dumps({key: value for key, value in document.items() if key != "runs"}, indent=1)
    file.write_text(f'{head.removesuffix("}").rstrip()},\n "runs": [\n' + ",\n".join(runs) + "\n]}\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="add a run's results to a file of measurements")
    adding.add_argument("results", type=Path)
    adding.add_argument("--into", type=Path, required=True)
    adding.add_argument("--label", required=True, help="the run's name in the tables")
    adding.add_argument("--what", help="what was measured, in a sentence")
    adding.add_argument("--commit", help="by default the kit's own")
    adding.add_argument("--date", help="by default that of the run")
    adding.add_argument("--read-tbs", type=float, dest="read_TBs", help="by default what the stage roof measured")
    tables = commands.add_parser("tables", help="print the tables of docs/measurements.md")
    tables.add_argument("document", type=Path)
    return parser.parse_args()


def main() -> int:
    arguments = vars(_arguments())
    try:
        if arguments.pop("command") == "tables":
            print(all_tables(read_document(arguments["document"])))
            return 0
        results, into = arguments.pop("results"), arguments.pop("into")
        document = read_document(into)
        add(document, as_run(read_results(results), arguments))
        write_document(into, document)
    except StarlingError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
