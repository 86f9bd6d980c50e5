"""The wait of a ``Drain`` call, and its end by timeout or cancellation."""

from __future__ import annotations

import asyncio

from runner_server.engine.drain import Drain
from runner_server.engine.engine import Engine


async def drain(engine: Engine, timeout_seconds: float | None) -> Drain:
    """Drain an engine; return the drain once all its requests have ended.

    If the wait is cancelled, the engine accepts requests again.

    Args:
        engine: The engine.
        timeout_seconds: Time after which the requests that are left are ended; None for no limit.

    Raises:
        ShuttingDown: The engine is stopping or dead.
    """
    begun = engine.drain()
    ended = asyncio.wrap_future(begun.future)
    is_drained = False
    try:
        done, _ = await asyncio.wait((ended,), timeout=timeout_seconds)
        if not done:
            engine.abort_drained(begun)
        await ended
        is_drained = True
    finally:
        engine.end_drain(begun, is_drained=is_drained)
    return begun
