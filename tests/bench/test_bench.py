"""The benches run, and their figures have the names and the kinds that they promise. Nothing here looks at a time."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson

from bench.gateway import Latencies, added, mock_upstream
from bench.load import quantile
from bench.mock_upstream import TOKENS
from service.sse import Rewriter

BENCH = Path(__file__).parents[2] / "bench"


def run(script: str, *arguments: str, folder: Path) -> tuple[str, str, dict[str, Any]]:
    """What the bench printed, what it noted, and its figures."""
    command = [sys.executable, str(BENCH / script), "--quick", "--json", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr, json.loads(done.stdout.splitlines()[-1])


def test_the_gateway_bench_prints_a_table_and_its_figures(plain_environment: None, tmp_path: Path, model: Path) -> None:
    options = ("--rates", "10,40", "--no-engine", "--litellm", "off", "--model", str(model), "--seed", "3")
    table, notes, figures = run("gateway.py", *options, folder=tmp_path)
    for name in ("added_ms_p50", "added_ms_p99", "first_byte_added_ms_p50", "first_byte_added_ms_p99", "cpu_ms"):
        assert math.isfinite(figures.pop(name))
    assert figures == {"rate": 40.0, "seed": 3, "quick": True}
    assert "| 10         | first byte, streams" in table
    assert "| 40         | first byte, streams" in table
    assert f"all {100 + 2 * 20 + 2 * 80} answers through the gateway are in its record" in notes
    assert not list((tmp_path / ".bench").iterdir())


def test_the_votes_bench_prints_a_table_and_its_figures(plain_environment: None, tmp_path: Path) -> None:
    table, notes, figures = run("votes.py", "--voters", "1,16", "--seed", "3", folder=tmp_path)
    for name in ("votes_per_s", "p99_ms", "single_transactions_per_s", "fsyncs_per_s"):
        assert figures.pop(name) > 0
    assert figures == {"voters": 16, "seed": 3, "quick": True}
    assert "| API, 16 at once" in table
    assert f"all {500 + 2 * (200 + 500)} acknowledged votes are in the database after SIGKILL" in notes
    assert not list((tmp_path / ".bench").iterdir())


async def test_the_mock_says_the_same_streamed_or_not_in_events_that_the_gateway_need_not_parse(
    tmp_path: Path,
) -> None:
    async with mock_upstream(tmp_path) as lane:
        whole = await lane.target.post("/v1/chat/completions", lane.body(stream=False, messages=[]))
        stream = await lane.target.post("/v1/chat/completions", lane.body(stream=True, messages=[]))
        lane.target.close()
    *events, rest = bytes(stream.body).split(b"\n\n")
    assert rest == b""
    rewrite = Rewriter(id="cpl_1", model="nightshift", fingerprint=None)
    sent = rewrite(events)
    assert rewrite.ended
    body = orjson.loads(whole.body)
    assert rewrite.transcripts()[0]["content"] == body["choices"][0]["message"]["content"]
    assert rewrite.usage is not None
    assert rewrite.usage["completion_tokens"] == body["usage"]["completion_tokens"] == TOKENS
    # A parsed event would put "id" first; one passed on keeps the head that was made once.
    assert sent.count(b'data: {"object"') == len(events) - 2


def test_added_latency_is_the_difference_within_a_repetition() -> None:
    def latencies(p50: float, p99: float) -> Latencies:
        return Latencies({"total": (p50, p99)}, cpu_ms=0.0, late_ms=0.0, failed=0)

    taken = {"direct": [latencies(10, 20), latencies(11, 30)], "nightshift": [latencies(12, 21), latencies(12, 35)]}
    assert added(taken, "nightshift", "total", 0) == [2, 1]
    assert added(taken, "nightshift", "total", 1) == [1, 5]


def test_a_quantile_is_one_of_the_values() -> None:
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([float(i) for i in range(100)], 0.99) == 98.0
    assert math.isnan(quantile([], 0.5))
