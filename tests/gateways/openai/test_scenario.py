"""Requests of scenario.json, and bodies that are not requests at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from support.http_child import HttpChild

pytestmark = pytest.mark.mlx

CASES = json.loads(Path(__file__).with_name("scenario.json").read_text())
CHAT = "/v1/chat/completions"
JSON = "application/json"


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_request(child: HttpChild, case: dict[str, Any]) -> None:
    body = json.dumps(case["body"]).replace("Infinity", "1e999").encode()
    status, answer = child.call("POST", case["path"], body, content_type=JSON)
    assert status == case["status"], answer
    if status != 200:
        error = answer["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "INVALID_FIELD")
        assert error["param"] == case.get("param", error["param"]), error


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", JSON),
        (b"{", JSON),
        (b"[]", JSON),
        (b"null", JSON),
        (b'{"messages": NaN}', JSON),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', JSON),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', JSON),
        (b'{"tools": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", JSON),
        (b'{"a":' * 900 + b"1" + b"}" * 900, JSON),
        (b'{"seed": ' + b"9" * 5000 + b"}", JSON),
        (b'{"temperature": ' + b"9" * 400 + b', "messages": []}', JSON),
        (b'{"messages": []}', "text/plain"),
        (b"messages=1", "application/x-www-form-urlencoded"),
    ],
    ids=range(13),
)
def test_a_body_that_is_not_a_request(child: HttpChild, body: bytes, kind: str) -> None:
    status, answer = child.call("POST", CHAT, body, content_type=kind)
    assert status == 400, answer
    assert answer["error"]["code"] == "INVALID_FIELD"
    assert len(json.dumps(answer)) < 4096


def test_a_body_that_is_too_large_is_not_read(child: HttpChild) -> None:
    size = str(2**30)
    status, answer = child.call("POST", CHAT, b"{}", content_type=JSON, content_length=size)
    assert (status, answer["error"]["code"]) == (413, "INVALID_FIELD")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example"])
def test_other_host_names_are_refused_without_a_token(child: HttpChild, host: str) -> None:
    status, answer = child.call("GET", "/v1/models", host=host)
    assert (status, answer["error"]["code"]) == (403, "PERMISSION_DENIED")


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:1", "[::1]:80", "10.0.0.1", "a.localhost"]
)
def test_addresses_and_localhost_are_answered(child: HttpChild, host: str) -> None:
    assert child.call("GET", "/v1/models", host=host)[0] == 200


def test_unknown_urls_and_verbs_have_errors_of_the_interface(child: HttpChild) -> None:
    status, answer = child.call("GET", "/v1/files")
    assert (status, answer["error"]["code"]) == (404, "unknown_url")
    status, answer = child.call("GET", CHAT)
    assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
