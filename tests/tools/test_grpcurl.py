"""grpcurl against a real server: over TCP, over a unix socket, and with a token."""

from __future__ import annotations

import json
from typing import Any

import pytest

from support.external_tools import PROTOSET, SERVICE, Done, Run, ToolTarget

PROTO = ("-import-path", "proto", "-proto", "mlxrunner/v1/runner.proto")
ERROR_EXIT = 64
"""Base of grpcurl's exit codes, to which it adds the gRPC code."""


def run_grpcurl(run: Run, place: ToolTarget, *words: str, options: tuple[str, ...] = ()) -> Done:
    return run("grpcurl", *place.options, *options, place.address, *words, **place.env)


def parse_answers(done: Done) -> list[dict[str, Any]]:
    """Parse the printed messages, a sequence of JSON objects."""
    assert done.returncode == 0, done.stderr
    decoder, text, found = json.JSONDecoder(), done.stdout.strip(), []
    while text:
        message, end = decoder.raw_decode(text)
        found.append(message)
        text = text[end:].strip()
    return found


def call_method(
    run: Run, place: ToolTarget, method: str, request: dict[str, Any], *more: str
) -> Done:
    options = (*more, "-d", json.dumps(request))
    return run_grpcurl(run, place, f"{SERVICE}/{method}", options=options)


def test_services_and_methods_are_listed(run: Run, place: ToolTarget) -> None:
    services = run_grpcurl(run, place, "list").stdout.split()
    assert {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"} <= {*services}
    methods = (
        "Abort",
        "Chat",
        "Completion",
        "Detokenize",
        "Drain",
        "Embed",
        "Estimate",
        "Load",
        "RenderChat",
        "Status",
        "Tokenize",
        "Trim",
        "Unload",
        "WatchStatus",
    )
    assert run_grpcurl(run, place, "list", SERVICE).stdout.split() == [
        f"{SERVICE}.{m}" for m in methods
    ]


def test_descriptions_have_comments(run: Run, place: ToolTarget) -> None:
    """The comments come from the server itself, without the source at hand."""
    method = run_grpcurl(run, place, "describe", f"{SERVICE}.Unload").stdout
    assert "// Ends running and queued completions (with SHUTTING_DOWN)" in method
    assert "// - FAILED_PRECONDITION / BUSY: a load or another unload is running" in method
    assert "rpc Unload (" in method
    message = run_grpcurl(run, place, "describe", "mlxrunner.v1.StatusResponse").stdout
    comment = "  // Completions waiting for a slot, and calls of `Embed` waiting for memory.\n"
    assert f"{comment}  int32 queued_count = 9;" in message
    # Every field, every value and every method has its comment.
    for symbol in (SERVICE, "mlxrunner.v1.State", "mlxrunner.v1.CompletionOptions"):
        lines = [
            line.strip() for line in run_grpcurl(run, place, "describe", symbol).stdout.splitlines()
        ]
        named = [i for i, line in enumerate(lines) if line.endswith(";")]
        assert len(named) > 5
        assert all(lines[i - 1].startswith("//") for i in named)


@pytest.mark.parametrize("source", [("-protoset", PROTOSET), PROTO], ids=["protoset", "proto"])
def test_descriptions_without_a_server_have_comments(run: Run, source: tuple[str, ...]) -> None:
    done = run("grpcurl", *source, "describe", "mlxrunner.v1.StatusResponse")
    assert "  // Completions waiting for a slot, and calls of" in done.stdout, done.stderr


def test_the_status_is_readable(run: Run, place: ToolTarget) -> None:
    (status,) = parse_answers(run_grpcurl(run, place, f"{SERVICE}/Status"))
    assert status["state"] == "STATE_ACTIVE"
    assert status["model"]["architecture"] == "llama"
    assert int(status["pid"]) == place.child.process.pid


def test_tokenize_and_detokenize_are_inverses(run: Run, place: ToolTarget) -> None:
    text = "def grüße(name): # 🚀"
    (tokens,) = parse_answers(call_method(run, place, "Tokenize", {"content": text}))
    assert len(tokens["token_ids"]) > 5
    (back,) = parse_answers(
        call_method(run, place, "Detokenize", {"token_ids": tokens["token_ids"]})
    )
    assert back["content"] == text


def test_a_completion_is_streamed(run: Run, place: ToolTarget) -> None:
    options = {"num_predict": 24, "temperature": 0}
    request = {"prompt": "def read_lines(path):", "options": options}
    *pieces, last = parse_answers(call_method(run, place, "Completion", request))
    assert pieces
    assert not any(piece.get("done") for piece in pieces)
    assert last["done"] is True
    assert last["done_reason"] == "DONE_REASON_LENGTH"
    assert last["eval_count"] == 24
    assert sum(len(m.get("token_ids", ())) for m in (*pieces, last)) == 24
    assert "".join(m.get("content", "") for m in (*pieces, last)).startswith("\n    ")


def test_the_details_of_an_error_are_readable(run: Run, place: ToolTarget) -> None:
    request = {"prompt": "x", "options": {"top_k": -1}}
    done = call_method(run, place, "Completion", request, "-format-error")
    assert done.returncode == ERROR_EXIT + 3
    error = json.loads(done.stderr)
    assert error["code"] == 3
    info, bad = error["details"]
    assert info["@type"].endswith("google.rpc.ErrorInfo")
    assert (info["domain"], info["reason"]) == ("mlxrunner.v1", "INVALID_FIELD")
    assert bad["field_violations"][0]["field"] == "options.top_k"
    assert "@value" not in done.stderr


def test_the_numbers_of_an_error_are_readable(run: Run, place: ToolTarget) -> None:
    done = call_method(run, place, "Completion", {"prompt": "x " * 2000}, "-format-error")
    (info,) = json.loads(done.stderr)["details"]
    assert info["reason"] == "PROMPT_TOO_LONG"
    assert info["metadata"]["contextLength"] == "1024"
    assert int(info["metadata"]["promptTokens"]) > 1024


def test_a_proto_file_without_reflection_hides_the_details(run: Run, place: ToolTarget) -> None:
    """As docs/debugging.md warns, grpcurl then does not know the types of the details."""
    alone = call_method(run, place, "Completion", {"prompt": ""}, *PROTO)
    assert '"@value"' in alone.stderr
    both = call_method(run, place, "Completion", {"prompt": ""}, *PROTO, "-use-reflection")
    assert '"reason": "INVALID_FIELD"' in both.stderr
    assert "@value" not in both.stderr


def test_without_the_token_every_call_is_refused(run: Run, places: dict[str, ToolTarget]) -> None:
    guarded = places["token"]
    bare = ("grpcurl", "-plaintext", "-protoset", PROTOSET)
    for method in ("Status", "Completion"):
        done = run(*bare, guarded.address, f"{SERVICE}/{method}")
        assert done.returncode == ERROR_EXIT + 16
        assert "Code: Unauthenticated" in done.stderr
    listed = run("grpcurl", "-plaintext", guarded.address, "list")
    assert listed.returncode != 0
    assert "Unauthenticated" in listed.stderr


def test_the_token_is_not_an_argument(places: dict[str, ToolTarget]) -> None:
    """Every user of the machine sees arguments; grpcurl expands the token from a variable."""
    guarded = places["token"]
    assert "${TOKEN}" in " ".join(guarded.options)
    assert not any(guarded.env["TOKEN"] in option for option in guarded.options)
