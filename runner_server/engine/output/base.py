"""The end of a channel from the engine's thread to the event loop, whatever the channel carries."""

from __future__ import annotations

import asyncio
import threading

from runner_server.errors import RunnerFault


class Channel:
    """Base of the channels of requests: a fault, and the wakeup of the reader.

    Call ``fail`` on any thread, and ``wake`` on the event loop. The engine's thread wakes readers
    through a ``WakeupCoalescer``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fault: RunnerFault | None = None
        self._has_end = False
        self._ready = asyncio.Event()

    @property
    def fault(self) -> RunnerFault | None:
        """The fault that ends the request; None if there is none so far."""
        return self._fault

    def fail(self, fault: RunnerFault) -> bool:
        """End the request with a fault after everything already put.

        Returns:
            False if the request had an end already: its result, or a fault.
        """
        with self._lock:
            if self._fault or self._has_end:
                return False
            self._fault = fault
            return True

    def wake(self) -> None:
        """Wake the reader."""
        self._ready.set()
