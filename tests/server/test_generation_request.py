"""The status of a request, and the transitions legal in each."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.request import RequestStatus
from runner_server.engine.types import CompletionSpec, FinishReason, Prefill, Token
from runner_server.errors import ShuttingDown
from support.fakes import EOS, ByteCodec

WAITING, PREFILLING, DECODING, PREEMPTED, FINISHED = RequestStatus

TRANSITIONS: dict[str, Callable[[GenerationRequest], object]] = {
    "admit": lambda request: request.admit(),
    "token": lambda request: request.on_token(Token(request.id, 97)),
    "last token": lambda request: request.on_token(Token(request.id, EOS)),
    "preempt": lambda request: request.preempt(),
    "resume": lambda request: request.resume(),
    "cancel": lambda request: request.cancel(),
    "fail": lambda request: request.fail(ShuttingDown("gone")),
}

PATHS = {
    WAITING: [],
    PREFILLING: ["admit"],
    DECODING: ["admit", "token"],
    PREEMPTED: ["admit", "token", "preempt"],
    FINISHED: ["admit", "token", "last token"],
}

LEGAL = {
    (WAITING, "admit"): PREFILLING,
    (PREFILLING, "token"): DECODING,
    (PREFILLING, "last token"): FINISHED,
    (DECODING, "token"): DECODING,
    (DECODING, "last token"): FINISHED,
    (DECODING, "preempt"): PREEMPTED,
    (PREEMPTED, "resume"): DECODING,
    **{
        (status, name): FINISHED
        for status in RequestStatus
        if status is not FINISHED
        for name in ("cancel", "fail")
    },
}


def _request(status: RequestStatus = WAITING, max_tokens: int = 100) -> GenerationRequest:
    """Return a request in the given status."""
    request = GenerationRequest(CompletionSpec((1, 2), max_tokens), ByteCodec(), frozenset({EOS}))
    for name in PATHS[status]:
        TRANSITIONS[name](request)
    assert request.status is status
    return request


@pytest.mark.parametrize("name", TRANSITIONS)
@pytest.mark.parametrize("status", RequestStatus)
def test_each_status_allows_its_transitions_and_no_others(status: RequestStatus, name: str) -> None:
    request = _request(status)
    if expected := LEGAL.get((status, name)):
        TRANSITIONS[name](request)
        assert request.status is expected
        return
    with pytest.raises(RuntimeError, match=f"request {request.id} is {status.value} and cannot be"):
        TRANSITIONS[name](request)
    assert request.status is status


def test_progress_of_the_prompt_does_not_change_the_status() -> None:
    request = _request(PREFILLING)
    request.on_prefill(Prefill(request.id, 1, 2, cached=1))
    assert request.status is PREFILLING
    assert request.stats().cached_count == 1


def test_the_limit_of_tokens_finishes_a_request() -> None:
    request = _request(PREFILLING, max_tokens=1)
    result = request.on_token(Token(request.id, 97))
    assert result is not None
    assert result.reason is FinishReason.LENGTH
    assert request.status is FINISHED


def test_time_preempted_is_not_time_running(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    request = _request(DECODING)
    now += 2
    request.preempt()
    now += 50
    request.resume()
    now += 3
    result = request.on_token(Token(request.id, EOS))
    assert result is not None
    assert result.eval_seconds == pytest.approx(55)
    assert request.running_seconds(result) == pytest.approx(5)


@pytest.mark.parametrize("how", ["cancel", "fail"])
def test_the_times_of_a_finished_request_stand_still(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    request = _request(DECODING)
    now += 2
    TRANSITIONS[how](request)
    now += 50
    stats = request.stats()
    assert stats.eval_seconds == pytest.approx(2)
    assert stats.reason is None
