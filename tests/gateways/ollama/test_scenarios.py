"""Ollama's own packages for Python and JavaScript, on a pool and on a server."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import ollama
import pytest

from gateways.ollama.conftest import Served
from gateways.ollama.judging import judge

pytestmark = [pytest.mark.mlx, pytest.mark.slow]

HERE = Path(__file__).parent
SCENARIOS: list[dict[str, Any]] = json.loads((HERE / "scenarios.json").read_text())
CLIENT = HERE / "client"
_SECONDS = 300.0


def scenarios(served: Served) -> list[dict[str, Any]]:
    """Return the scenarios whose models are served, with the names of the models."""
    found = []
    for scenario in SCENARIOS:
        request = dict(scenario["request"])
        for field in ("model", "source"):
            name, colon, tag = request.get(field, "").partition(":")
            if name in ("DEMO", "SCRIPTED"):
                request[field] = served.models.get(name, "") + colon + tag
        expected = json.loads(json.dumps(scenario["expect"]).replace("DEMO", served.models["DEMO"]))
        if request.get("model", request.get("source")):
            found.append({**scenario, "request": request, "expect": expected})
    return found


def ask(client: ollama.Client, method: str, request: dict[str, Any]) -> dict[str, Any]:
    """Call the package for Python; return the outcome as the other clients report it."""
    try:
        answer = getattr(client, method)(**request)
        if request.get("stream"):
            return {"parts": [part.model_dump() for part in answer]}
        return {"answer": answer.model_dump()}
    except ollama.ResponseError as error:
        return {"error": {"status": error.status_code, "text": error.error}}


def assert_expected(asked: list[dict[str, Any]], results: dict[str, Any]) -> None:
    """Assert that all results are what their scenarios expect."""
    wrong = []
    for scenario in asked:
        try:
            judge(scenario["expect"], results[scenario["name"]])
        except (AssertionError, KeyError) as error:
            wrong.append(f"{scenario['name']}: {error!r}")
    assert wrong == []


def test_the_package_for_python_gets_what_it_expects(served: Served) -> None:
    asked = scenarios(served)
    with ollama.Client(served.url) as client:
        results = {each["name"]: ask(client, each["method"], each["request"]) for each in asked}
    assert_expected(asked, results)


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
@pytest.mark.skipif(
    not (CLIENT / "node_modules").is_dir(), reason="its packages are missing: npm ci in the folder"
)
def test_the_package_for_javascript_gets_what_it_expects(served: Served, tmp_path: Path) -> None:
    asked = scenarios(served)
    file = tmp_path / "scenarios.json"
    file.write_text(json.dumps(asked))
    command = ["node", str(CLIENT / "run.mjs"), str(file), served.url]
    done = subprocess.run(command, capture_output=True, timeout=_SECONDS, check=True)
    lines = [line for line in done.stdout.decode().splitlines() if line.startswith('{"name"')]
    results = {found["name"]: found for found in map(json.loads, lines)}
    assert_expected(asked, results)
