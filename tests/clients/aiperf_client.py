"""NVIDIA's AIPerf: a load of streamed chats with the bundle's own tokenizer; every request must end well."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FACTS = json.loads(os.environ["STARLING_CLIENT"])
REQUESTS, TOKENS = 12, 8

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    shutil.copy(Path(FACTS["bundle"]) / "tokenizer.json", folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    ran = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("aiperf")), "profile", "--model", FACTS["model"]),
            *("--url", FACTS["url"], "--endpoint-type", "chat", "--streaming", "--tokenizer", name),
            *("--request-count", str(REQUESTS), "--concurrency", "4", "--synthetic-input-tokens-mean", "40"),
            *("--output-tokens-mean", str(TOKENS), "--extra-inputs", "ignore_eos:true", "--ui", "none"),
            *("--artifact-dir", str(folder / "out"), "--random-seed", "5"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    found = list((folder / "out").rglob("profile_export_aiperf.json"))
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    assert found, ran.stdout[-3000:]
    report = json.loads(found[0].read_text())

requests = report["request_count"]["avg"]
assert requests == REQUESTS, requests
assert not report.get("error_request_count", {}).get("avg"), report["error_request_count"]
assert report["output_sequence_length"]["avg"] >= TOKENS - 1, report["output_sequence_length"]
assert report["time_to_first_token"]["avg"] > 0
assert report["inter_token_latency"]["avg"] > 0
print(f"{REQUESTS} streamed chats, 4 at a time, none failed")
