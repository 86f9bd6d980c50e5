"""Requests that no package sends, as bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from gateways.ollama.conftest import Served

pytestmark = [pytest.mark.mlx, pytest.mark.slow]

JSON = {"content-type": "application/json"}
FORM = {"content-type": "application/x-www-form-urlencoded"}


@pytest.fixture
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client


def chat(served: Served, **changes: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Hello!"}]
    options = {"temperature": 0}
    request = {"model": served.models["DEMO"], "messages": messages, "options": options}
    return {**request, "stream": False, **changes}


def assert_serves(served: Served, http: httpx.Client) -> None:
    """Assert that a good request is still answered."""
    answer = http.post("/api/chat", json=chat(served))
    assert answer.json()["message"]["content"] == "Hello! How can I help you?"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'"x"', "not a JSON object"),
        (b'{"model": NaN}', "NaN"),
        (b'{"model": "\xff"}', "not UTF-8"),
        (b'{"model": "\\ud800"}', "half a character"),
        (b'{"model": ' + b"[" * 200_000, "too deeply"),
        (b'{"model": "m", "options": {"seed": ' + b"9" * 5000 + b"}}", "not JSON"),
        (b'{"model": "m", "prompt": "x", "options": {"temperature": 1e999}}', "temperature"),
        (b'{"model": "m", "prompt": "x", "options": {"temperature": -1e999}}', "temperature"),
        (b'{"model": "m", "prompt": "x", "options": {"top_k": 99999999999999}}', "top_k"),
        (b'{"model": "m", "prompt": "x", "keep_alive": {"a": 1}}', "keep_alive"),
        (b'{"model": "m", "prompt": 5}', "prompt"),
        (b'{"model": ["m"], "prompt": "x"}', "model"),
        (b'{"prompt": "x"}', "model"),
        (b'{"model": "m", "prompt": "x", "\\u0000\\n": 1}', "not a field"),
    ],
)
def test_a_bad_body_is_refused(served: Served, http: httpx.Client, body: bytes, word: str) -> None:
    answer = http.post("/api/generate", content=body, headers=JSON)
    assert answer.status_code == 400
    (error,) = answer.json().values()
    assert word in error
    assert_serves(served, http)


@pytest.mark.parametrize("form", [{}, {"type": "object"}])
def test_a_deep_schema_is_refused(served: Served, http: httpx.Client, form: dict[str, Any]) -> None:
    for _ in range(400):
        form = {"properties": {"a": form}}
    answer = http.post("/api/chat", json=chat(served, format=form))
    assert answer.status_code == 400
    assert "error" in answer.json()


def test_names_of_models_are_only_names(served: Served, http: httpx.Client) -> None:
    for name in ("../../etc", "a\x00b", "x" * 5000, "\n", "::latest", "%s"):
        answer = http.post("/api/chat", json=chat(served, model=name))
        assert answer.status_code in (400, 404), name
        assert isinstance(answer.json()["error"], str)


def test_programs_may_send_json_as_a_form_but_web_sites_may_not(
    served: Served, http: httpx.Client
) -> None:
    body = json.dumps(chat(served)).encode()
    assert http.post("/api/chat", content=body, headers=FORM).status_code == 200
    assert http.post("/api/chat", content=body).status_code == 200
    for header in ({"origin": "https://example.com"}, {"sec-fetch-site": "cross-site"}):
        refused = http.post("/api/chat", content=body, headers=FORM | header)
        assert refused.status_code == 400
        assert "content type" in refused.json()["error"]


def test_a_name_that_resolves_to_this_machine_is_refused(http: httpx.Client) -> None:
    answer = http.get("/api/tags", headers={"host": "example.com"})
    assert answer.status_code == 403
    assert "host name" in answer.json()["error"]


def test_an_unknown_route_has_the_form_of_errors(http: httpx.Client) -> None:
    assert "/api/nothing" in http.post("/api/nothing", json={}).json()["error"]
    assert http.post("/api/nothing", json={}).status_code == 404
    assert http.get("/api/chat").status_code == 405


def test_programs_find_the_server_by_its_greeting(http: httpx.Client) -> None:
    assert http.get("/").text == "Ollama is running"
    assert http.head("/").status_code == 200
    assert re.fullmatch(r"\d+\.\d+\.\d+", http.get("/api/version").json()["version"])


def test_a_stream_is_lines_of_json(served: Served, http: httpx.Client) -> None:
    with http.stream("POST", "/api/chat", json=chat(served, stream=None)) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        parts = [json.loads(line) for line in answer.iter_lines()]
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(re.fullmatch(r"[\d-]{10}T[\d:]{8}\.\d{6}Z", each["created_at"]) for each in parts)
