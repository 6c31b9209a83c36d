"""`starling serve` under mixed requests, some of which go away, are wrong, late, or find the queue full."""

import json
from pathlib import Path

import pytest
from http_server import serving

from starling.profiling.load import over_http as serve_load

pytestmark = pytest.mark.slow


def test_mixed_requests_all_end_and_leave_rows_and_metrics_even(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max-batch", "2", "--max-queue", "2", "--max-seq", "512")
    with serving(tiny_bundle, *options) as server:
        status = serve_load.main(
            ["--http", f"127.0.0.1:{server.port}", "--pid", str(server.process.pid), "--requests", "60", "--alone"]
        )
        report = json.loads(capsys.readouterr().out)
        assert (status, report["even"]) == (0, True), report
        outcomes = report["outcomes"]
        assert sum(outcomes.values()) == 60
        assert {"whole", "streamed", "disconnected", "refused", "busy"} <= set(outcomes)
        assert sum(report["ended_by_reason"].values()) == report["metrics"]["ended"]
        assert report["asked_alone"] == outcomes["whole"] + outcomes["streamed"]
        assert report["differ_alone"] == []
        assert len(report["rss_mb"]) == serve_load.ROUNDS + 1
        assert server.metric("vllm:num_requests_running") == server.metric("vllm:num_requests_waiting") == 0
        assert server.end() == 0
        assert not any("Traceback" in line for line in server.log)
