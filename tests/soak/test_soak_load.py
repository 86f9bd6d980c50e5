"""Load of the soak: request mix, pace, and classification of failures."""

from __future__ import annotations

from dataclasses import replace

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.api.validation import completion_draft
from runner_server.engine.types import ModelInfo
from runner_server.errors import RunnerFault
from soak.drive import OVERLOAD, Pace
from soak.mix import CANCELLED_SHARE, MAX_NEW_TOKENS, Corpus, Mix, known_set
from soak.records import Ending, Order
from soak.table import Failure, judge

TEXT = "def read(path):\n    return path.read_text()\n" * 200
CORPUS = Corpus([TEXT] * 3, [[7, 8, 9] * 1000] * 3, vocab_size=2048, context_length=1024)
MODEL = ModelInfo(
    name="demo",
    path="/demo",
    architecture="llama",
    max_context_length=1024,
    vocab_size=2048,
    weight_bytes=1,
    dtype="float32",
    quantization_bits=0,
    eos_token_ids=frozenset({0}),
    context_length=1024,
    parallel=8,
    limit_bytes=1,
)


def _orders(count: int, seed: int = 0) -> list[Order]:
    mix = Mix(CORPUS, seed, known_set(CORPUS, seed, 4))
    return [mix.next() for _ in range(count)]


def _refusal(request: pb.CompletionRequest) -> str:
    """Return the reason given by the server's validation; empty for a valid request."""
    try:
        draft = completion_draft(request, MODEL)
        # An upper bound of the tokens that the demo model's tokenizer makes of this text.
        ids = list(request.prompt_token_ids.ids) or [7] * (len(request.prompt) // 2)
        draft.fit(ids, MODEL)
    except RunnerFault as fault:
        return pb.ErrorReason.Name(fault.reason).removeprefix("ERROR_REASON_")
    return ""


def test_the_same_seed_makes_the_same_requests() -> None:
    assert _orders(300) == _orders(300)
    assert _orders(300) != _orders(300, seed=1)


def test_the_planned_share_is_cancelled() -> None:
    orders = [order for order in _orders(3000) if not order.expected_reason]
    share = sum(order.is_cancelled for order in orders) / len(orders)
    assert share == pytest.approx(CANCELLED_SHARE, abs=0.03)


def test_the_mix_covers_every_kind_of_request() -> None:
    orders = _orders(2000)
    requests = [order.request for order in orders]
    assert any(order.deadline_seconds for order in orders)
    assert any(order.reader.pause_seconds for order in orders)
    assert any(order.reader.stop_after for order in orders)
    assert any(order.own_connection for order in orders)
    assert any(order.known is not None for order in orders)
    assert {request.WhichOneof("input") for request in requests} == {"prompt", "prompt_token_ids"}
    assert any(request.HasField("logprobs") for request in requests)
    assert any(request.options.stop for request in requests)
    assert any(request.options.HasField("seed") for request in requests)
    lengths = [len(request.prompt) for request in requests if request.prompt]
    assert min(lengths) < 30 < 1000 < max(lengths)


def test_requests_are_valid_or_invalid_as_planned() -> None:
    for order in _orders(2000):
        assert _refusal(order.request) == order.expected_reason
    assert {order.expected_reason for order in _orders(2000)} == {
        "",
        "INVALID_FIELD",
        "PROMPT_TOO_LONG",
    }


def test_the_known_set_is_reproducible() -> None:
    known = known_set(CORPUS, 0, 50)
    for request in known:
        assert request.options.HasField("seed") or not request.options.temperature
        assert 1 <= request.options.num_predict <= MAX_NEW_TOKENS
    sent = [order for order in _orders(500) if order.known is not None]
    assert all(order.request == known[order.known or 0] for order in sent)


def test_the_pace_finds_twice_the_capacity_and_keeps_it() -> None:
    # Simulates a server that finishes at most 20 requests a second.
    pace, capacity, now, ends = Pace(0.0), 20.0, 0.0, 0.0
    rates = []
    for _ in range(600):
        now += 0.1
        rate = pace.per_second(now)
        rates.append(rate)
        ends += min(rate, capacity) * 0.1
        for _ in range(int(ends)):
            pace.note_end(now)
        ends %= 1
    assert rates[0] < capacity / 2
    assert rates[-1] == pytest.approx(OVERLOAD * capacity, rel=0.1)
    assert max(rates) < 1.3 * OVERLOAD * capacity
    assert min(rates[300:]) > 0.8 * OVERLOAD * capacity


def test_a_server_that_stops_is_not_flooded() -> None:
    pace = Pace(0.0)
    for number in range(100):
        pace.note_end(number / 10)
    assert pace.per_second(10.0) == pytest.approx(20)
    assert pace.per_second(100.0) == pytest.approx(4)


PLAIN = Order(pb.CompletionRequest(prompt="x"))
FULL = Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", 1.5)
FIELD = Failure(grpc.StatusCode.INVALID_ARGUMENT, "bad", "INVALID_FIELD")
LATE = Failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


@pytest.mark.parametrize(
    ("order", "failure", "ending"),
    [
        (PLAIN, FULL, Ending.REFUSED),
        (replace(PLAIN, deadline_seconds=1.0), LATE, Ending.EXPIRED),
        (replace(PLAIN, expected_reason="INVALID_FIELD"), FIELD, Ending.REJECTED),
    ],
)
def test_expected_failures_are_not_problems(order: Order, failure: Failure, ending: Ending) -> None:
    assert judge(order, failure) == (ending, "")


@pytest.mark.parametrize(
    ("order", "failure"),
    [
        (PLAIN, LATE),
        (PLAIN, FIELD),
        (PLAIN, Failure(grpc.StatusCode.INTERNAL, "MLX raised", "GENERATION_FAILED")),
        (PLAIN, Failure(grpc.StatusCode.UNKNOWN, "KeyError")),
        (PLAIN, Failure(grpc.StatusCode.UNAVAILABLE, "Socket closed")),
        # The expected reason with another status code.
        (PLAIN, Failure(grpc.StatusCode.INTERNAL, "full", "QUEUE_FULL", 1.5)),
        (replace(PLAIN, expected_reason="PROMPT_TOO_LONG"), FIELD),
        (replace(PLAIN, expected_reason="INVALID_FIELD"), FULL),
    ],
)
def test_other_failures_are_problems(order: Order, failure: Failure) -> None:
    ending, problem = judge(order, failure)
    assert ending is Ending.FAILED
    assert failure.code.name in problem


@pytest.mark.parametrize("delay", [None, 0.0, -1.0, 61.0])
def test_a_full_queue_without_a_valid_retry_delay_is_a_problem(delay: float | None) -> None:
    ending, problem = judge(PLAIN, replace(FULL, retry_seconds=delay))
    assert ending is Ending.REFUSED
    assert "retry delay" in problem
