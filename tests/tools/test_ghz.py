"""ghz against a real server: the answers, and the latencies in the run_ghz."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.external_tools import PROTOSET, SERVICE, Run, ToolTarget

COMPLETION = {"prompt": "def main(", "options": {"num_predict": 8, "temperature": 0}}


def run_ghz(run: Run, place: ToolTarget, method: str, *args: str) -> dict[str, Any]:
    call = ("--insecure", "--call", f"{SERVICE}.{method}", "--format=json", "--timeout=60s")
    done = run("ghz", *call, *args, place.target)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def assert_all_ok(found: dict[str, Any], count: int) -> None:
    assert found["count"] == count
    assert found["statusCodeDistribution"] == {"OK": count}, found["errorDistribution"]
    assert found["rps"] > 0
    shares = [entry["percentage"] for entry in found["latencyDistribution"]]
    assert shares == [10, 25, 50, 75, 90, 95, 99]
    latencies = [entry["latency"] for entry in found["latencyDistribution"]]
    assert 0 < found["fastest"] <= latencies[0]
    assert latencies == sorted(latencies)
    assert latencies[-1] <= found["slowest"]


@pytest.mark.parametrize("where", ["tcp", "unix"])
@pytest.mark.parametrize(("method", "request_"), [("Status", {}), ("Completion", COMPLETION)])
def test_every_call_is_answered(
    run: Run, places: dict[str, ToolTarget], where: str, method: str, request_: dict[str, Any]
) -> None:
    load = ("--total=40", "--concurrency=8", "--data", json.dumps(request_))
    assert_all_ok(run_ghz(run, places[where], method, *load), 40)


def test_the_token_may_come_from_a_file(
    run: Run, places: dict[str, ToolTarget], tmp_path: Path
) -> None:
    """The call uses the protoset, because ghz sends no metadata from a file to reflection."""
    guarded, metadata = places["token"], tmp_path / "metadata.json"
    metadata.write_text(json.dumps({"authorization": f"Bearer {guarded.env['TOKEN']}"}))
    load = ("--total=10", "--concurrency=2", f"--protoset={PROTOSET}")
    assert_all_ok(run_ghz(run, guarded, "Status", *load, f"--metadata-file={metadata}"), 10)


def test_failed_calls_are_counted_by_code(run: Run, places: dict[str, ToolTarget]) -> None:
    load = ("--total=6", "--concurrency=2", "--data", '{"prompt": ""}')
    found = run_ghz(run, places["tcp"], "Completion", *load)
    assert found["statusCodeDistribution"] == {"InvalidArgument": 6}
