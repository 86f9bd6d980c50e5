"""The book that two threads share, where only one at a time can show it."""

from __future__ import annotations

from runner_server.engine.request_registry import RequestRegistry, Ticket, stopping_fault
from runner_server.engine.types import State


def test_a_ticket_given_up_at_the_end_does_no_harm() -> None:
    registry = RequestRegistry(max_queued=1)
    ticket = Ticket[int](lambda _: 0)
    registry.open_ticket(ticket, State.LOADING)
    assert ticket.future.cancel()
    registry.fail_ticket(stopping_fault())
    assert ticket.future.cancelled()


def test_the_last_error_is_bounded() -> None:
    registry = RequestRegistry(max_queued=1)
    registry.note_error("x" * 100_000)
    assert len(registry.state().last_error) == 512
    registry.die("y" * 100_000)
    assert len(registry.state().last_error) == 512
