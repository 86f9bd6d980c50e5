"""Records of calls, their frozen summaries, and the observers that get them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.types import FinishReason, GenerationStats
from runner_server.telemetry.call_record import CallRecord, CallSummary
from runner_server.telemetry.interceptor import Observer
from support.harness import StartServer, eventually

STATS = GenerationStats(6, 0, 3, 0.1, 0.2, 0.3, FinishReason.STOP)


def test_a_summary_has_what_the_record_had_at_the_end() -> None:
    record = CallRecord("Completion", "id", request_id="mine", trace_id="t", parent_id="p")
    record.model, record.stats, record.reason, record.span_id = "m", lambda: STATS, "BUSY", "s"
    call = record.end("FAILED_PRECONDITION")
    record.model = record.reason = record.span_id = "later"
    assert call == CallSummary(
        method="Completion",
        id="id",
        code="FAILED_PRECONDITION",
        seconds=call.seconds,
        reason="BUSY",
        request_id="mine",
        model="m",
        stats=STATS,
        trace_id="t",
        parent_id="p",
        span_id="s",
    )
    with pytest.raises(dataclasses.FrozenInstanceError):
        call.reason = "another"  # type: ignore[misc]  # the point


class Marking:
    """Observer that marks the record at the arrival, and keeps the summaries."""

    def __init__(self, *, marks: bool) -> None:
        self.marks = marks
        self.seen: list[CallSummary] = []

    def observe(self, call: CallRecord) -> Callable[[CallSummary], None]:
        """Set the span's id, as tracing does."""
        if self.marks:
            call.span_id = "marked"
        return self.seen.append


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_the_order_of_observers_does_not_matter(
    start_server: StartServer, order: Sequence[int]
) -> None:
    server = await start_server()
    both = Marking(marks=True), Marking(marks=False)
    observers: list[Observer] = [both[index] for index in order]
    server.app._observers[:] = observers
    await server.stub.Status(pb.StatusRequest())
    await eventually(lambda: all(each.seen for each in both))
    (first,), (second,) = both[0].seen, both[1].seen
    assert first is second
    assert (first.method, first.code, first.span_id) == ("Status", "OK", "marked")
