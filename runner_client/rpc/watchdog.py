"""Cancels reads that last too long: a sync gRPC stream's read takes no timeout."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LINGER_SECONDS = 5.0
"""How long the thread sleeps at most, and stays when there is nothing to watch."""


class Watchdog:
    """Calls back when a deadline passes. One thread watches all streams of a client.

    The thread starts with the first deadline and ends by itself. Arming costs a
    lock and a dictionary entry, so that it can be done for every message.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._armed: dict[int, tuple[float, Callable[[], None]]] = {}
        self._wakes_at = 0.0
        self._thread: threading.Thread | None = None

    def arm(self, key: int, deadline: float, expire: Callable[[], None]) -> None:
        """Calls ``expire`` once, on the watchdog's thread, unless disarmed by then.

        Args:
            key: Names this deadline; a second one with the same key replaces it.
            deadline: As ``time.monotonic()`` counts; infinity is never.
            expire: Must neither block nor raise.
        """
        if deadline == math.inf:
            return
        with self._condition:
            self._armed[key] = (deadline, expire)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="runner-client-watchdog", daemon=True
                )
                self._thread.start()
            elif deadline < self._wakes_at:
                self._condition.notify()

    def disarm(self, key: int) -> None:
        """Forgets a deadline, if it is still there."""
        with self._condition:
            self._armed.pop(key, None)

    def _watch(self) -> None:
        lingers = False
        while True:
            with self._condition:
                expired = self._take_expired(time.monotonic())
                if not expired:
                    if lingers and not self._armed:
                        self._thread = None
                        return
                    lingers = not self._armed
                    self._sleep()
            for expire in expired:
                expire()

    def _take_expired(self, now: float) -> list[Callable[[], None]]:
        keys = [key for key, (deadline, _) in self._armed.items() if deadline <= now]
        return [self._armed.pop(key)[1] for key in keys]

    def _sleep(self) -> None:
        now = time.monotonic()
        soonest = min((deadline for deadline, _ in self._armed.values()), default=math.inf)
        self._wakes_at = min(soonest, now + _LINGER_SECONDS)
        self._condition.wait(self._wakes_at - now)
