"""Wakeups of the watchers of the engine's state."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from runner_server.engine.output.wakeups import call_on_loop


class ChangeSignal:
    """Sets the events of all watchers on the event loop after a change of the engine's state.

    A change costs a watcher nothing but its event: watchers read the state themselves, so any
    number of changes before they do counts as one. Without watchers a change costs nothing.

    Args:
        loop: The event loop of the watchers.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watchers: set[asyncio.Event] = set()
        # Whether a call on the event loop is scheduled. A notification that finds it set needs no
        # other, because the watchers read the state after that call.
        self._is_notified = False

    @contextmanager
    def watch(self) -> Iterator[asyncio.Event]:
        """Yield an event that is set after each change; the watcher clears it before it reads."""
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            yield event
        finally:
            self._watchers.discard(event)

    def notify(self) -> None:
        """Wake the watchers, after the change itself. Thread-safe."""
        if self._watchers and not self._is_notified:
            self._is_notified = True
            call_on_loop(self._loop, self._wake)

    def _wake(self) -> None:
        self._is_notified = False
        for event in self._watchers:
            event.set()
