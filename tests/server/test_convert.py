"""What the engine tells of a prefix cache, in the protocol's messages."""

from __future__ import annotations

import pytest

from harness import Server
from runner_server.convert import piece_message
from runner_server.messages import Done, DoneReason, MemoryCounters, Piece


def test_the_last_message_tells_what_was_not_evaluated_again() -> None:
    done = Done(DoneReason.STOP, "", 9, 3, 0.0, 0.0, 0.0, cached_count=5)
    message = piece_message(Piece(done=done), lambda _ids: "")
    assert (message.prompt_eval_count, message.prompt_cached_count) == (9, 5)


async def test_status_tells_what_is_kept(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = MemoryCounters(active_bytes=2**40, cache_bytes=1, prefix_cache_bytes=2**33)
    monkeypatch.setattr(server.backend, "memory", lambda: counters)
    status = await server.status()
    assert status.memory_usage.prefix_cache_bytes == 2**33
    assert status.memory == 2**40 + 1
