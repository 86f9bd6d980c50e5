"""The moments at which ``WatchStatus`` reports, without polling."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from runner_server.engine.engine import Engine
from runner_server.engine.types import EngineState, State

_MIN_GAP_SECONDS = 0.05
"""Shortest time between two reports. A status takes about 0.1 ms to make and to send, so a watcher
of a runner with thousands of short completions costs 0.2 % of a core."""


async def states(
    engine: Engine, interval_seconds: float | None
) -> AsyncGenerator[EngineState, None]:
    """Yield the state of the engine now, after each change and at the interval.

    Changes that happen between two reads of the iterator, or within 50 ms, are merged. Close the
    iterator with ``aclosing``.

    Args:
        engine: The engine.
        interval_seconds: Longest time between two states; None waits for a change.

    Raises:
        ShuttingDown: The engine is stopping or dead; the last state said so.
    """
    now = asyncio.get_running_loop().time
    with engine.watch() as changed:
        while True:
            changed.clear()
            state, taken_at = engine.state(), now()
            yield state
            if state.state in (State.STOPPING, State.FAILED):
                engine.refuse_when_ending()
            due = None if interval_seconds is None else taken_at + interval_seconds
            try:
                async with asyncio.timeout_at(due):
                    await _change(engine, changed, state, taken_at + _MIN_GAP_SECONDS)
            except TimeoutError:
                pass


async def _change(
    engine: Engine, changed: asyncio.Event, since: EngineState, earliest: float
) -> None:
    """Return once the state differs from ``since``, but not before ``earliest``."""
    now = asyncio.get_running_loop().time
    while True:
        await changed.wait()
        await asyncio.sleep(max(0.0, earliest - now()))
        changed.clear()
        if _watched(engine.state()) != _watched(since):
            return


def _watched(state: EngineState) -> tuple[object, ...]:
    """Return the values whose changes are reported."""
    counts = (state.running_count, state.queued_count)
    return (state.state, state.progress, *counts, state.model, state.last_error)
