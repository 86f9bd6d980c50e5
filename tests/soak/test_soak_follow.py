"""Follower of one soak stream, for every kind of ending."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from soak import follow
from soak.drive import Driver
from soak.follow import Follower, Outcome
from soak.records import Answer, Ending, Order, Reader, Tally
from support.harness import Server, StartServer, eventually


def _order(prompt: str = "hello", count: int = 5, **fields: Any) -> Order:
    options = pb.CompletionOptions(num_predict=count, seed=1)
    return Order(pb.CompletionRequest(prompt=prompt, options=options), **fields)


async def _follow(server: Server, order: Order) -> Outcome:
    return await Follower(order, lambda _count: None).run(server.stub)


async def test_a_whole_stream_is_done(loaded: Server) -> None:
    counts: list[int] = []
    outcome = await Follower(_order(count=50), counts.append).run(loaded.stub)
    assert (outcome.ending, outcome.problem) == (Ending.DONE, "")
    assert outcome.answer.text == await loaded.text(num_predict=50, seed=1)
    assert sum(counts) == len(outcome.answer.token_ids) == 50
    assert outcome.first_seconds is not None
    assert outcome.queue_seconds is not None


async def test_a_stream_is_cancelled_after_a_message(loaded: Server) -> None:
    outcome = await _follow(loaded, _order(count=4000, cancel_messages=1))
    assert (outcome.ending, outcome.problem) == (Ending.CANCELLED, "")
    await loaded.settled()


async def test_a_queued_request_is_cancelled(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    outcome = await _follow(loaded, _order(cancel_seconds=0.05))
    assert (outcome.ending, outcome.problem) == (Ending.CANCELLED, "")
    loaded.backend.step_gate.open()
    await loaded.settled()


async def test_a_stream_that_ends_before_the_cancellation_is_done(loaded: Server) -> None:
    outcome = await _follow(loaded, _order(count=2, cancel_seconds=15.0))
    assert (outcome.ending, outcome.problem) == (Ending.DONE, "")


async def test_a_request_past_its_deadline_is_expired(loaded: Server) -> None:
    loaded.backend.step_gate.shut()
    outcome = await _follow(loaded, _order(deadline_seconds=0.05))
    assert (outcome.ending, outcome.problem) == (Ending.EXPIRED, "")


async def test_a_stream_without_end_is_stuck(
    loaded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "STREAM_SECONDS", 0.05)
    loaded.backend.step_gate.shut()
    outcome = await _follow(loaded, _order())
    assert outcome.ending is Ending.STUCK
    assert "stuck" in outcome.problem


async def test_a_reader_that_stops_extends_the_time_limit(
    loaded: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "STREAM_SECONDS", 5.0)
    order = _order(count=200, reader=Reader(stop_after=1, stop_seconds=0.1))
    outcome = await _follow(loaded, order)
    assert (outcome.ending, outcome.problem) == (Ending.DONE, "")


async def test_a_failed_step_is_a_problem(loaded: Server) -> None:
    loaded.backend.failures = [RuntimeError("boom")]
    outcome = await _follow(loaded, _order())
    assert outcome.ending is Ending.FAILED
    assert "GENERATION_FAILED" in outcome.problem


async def test_a_full_queue_gives_a_retry_delay(start_server: StartServer) -> None:
    server = await start_server(max_queued=1)
    await server.load(parallel=1)
    server.backend.step_gate.shut()
    calls = [server.start(str(i)) for i in range(2)]
    await eventually(lambda: server.view.request_count == 2)
    outcome = await _follow(server, _order())
    assert (outcome.ending, outcome.problem) == (Ending.REFUSED, "")
    assert outcome.retry_seconds
    for call in calls:
        call.cancel()


async def test_serving_an_invalid_request_is_a_problem(loaded: Server) -> None:
    outcome = await _follow(loaded, _order(expected_reason="INVALID_FIELD"))
    assert outcome.ending is Ending.DONE
    assert "INVALID_FIELD" in outcome.problem


class _Stub:
    """Stub that returns fixed messages, including invalid ones."""

    def __init__(self, *messages: pb.CompletionResponse) -> None:
        self._messages = messages

    def Completion(self, *_args: object, **_options: object) -> _Stub:  # noqa: N802 - the rpc's
        return self

    async def __aiter__(self) -> AsyncIterator[pb.CompletionResponse]:
        for message in self._messages:
            yield message

    def cancel(self) -> None:
        """Do nothing; part of the interface of a call."""


TOKEN = pb.CompletionResponse(content="x", token_ids=[7])
END = pb.CompletionResponse(done=True, done_reason=pb.DONE_REASON_LENGTH, eval_count=1)


@pytest.mark.parametrize(
    ("messages", "ending", "words"),
    [
        ([TOKEN], Ending.FAILED, "without a last message"),
        ([], Ending.FAILED, "without a last message"),
        ([TOKEN, TOKEN, END], Ending.DONE, "eval_count 1, but 2 of 5"),
        ([TOKEN, pb.CompletionResponse(done=True, eval_count=1)], Ending.DONE, "done_reason 0"),
        ([TOKEN, END], Ending.DONE, ""),
    ],
)
async def test_the_last_message_is_checked(
    messages: list[pb.CompletionResponse], ending: Ending, words: str
) -> None:
    stub: Any = _Stub(*messages)
    outcome = await Follower(_order(), lambda _count: None).run(stub)
    assert outcome.ending is ending
    assert words in outcome.problem
    assert bool(words) == bool(outcome.problem)


async def test_a_stop_string_in_the_text_is_a_problem() -> None:
    stub: Any = _Stub(TOKEN, END)
    order = _order()
    order.request.options.stop.append("x")
    outcome = await Follower(order, lambda _count: None).run(stub)
    assert "stop string" in outcome.problem


ALONE = Answer("abc", (1, 2, 3))


@pytest.mark.parametrize(
    ("ending", "answer", "differing"),
    [
        (Ending.DONE, ALONE, 0),
        (Ending.DONE, Answer("ab", (1, 2)), 1),
        (Ending.CANCELLED, Answer("ab", (1, 2)), 0),
        (Ending.CANCELLED, Answer("a", (1, 2)), 0),
        (Ending.EXPIRED, Answer("ac", (1, 3)), 1),
        (Ending.CANCELLED, Answer("", ()), 0),
    ],
)
async def test_partial_answers_of_the_known_set_are_compared(
    ending: Ending, answer: Answer, differing: int
) -> None:
    tally, unused = Tally(), Any
    runner: Any = unused
    mix: Any = unused
    driver = Driver(runner, mix, tally, [ALONE], 0)
    driver._count(replace(_order(), known=0), Outcome(ending, answer))
    assert tally.differing == tally.problem_count == differing
    assert tally.endings == {ending: 1}
