"""Cancellation of overdue reads, because a read from a sync gRPC stream takes no timeout."""

from __future__ import annotations

import math
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LINGER_SECONDS = 5.0
"""The longest sleep of the thread, and how long it stays idle before it exits."""


class Watchdog:
    """Timer thread for the deadlines of a client's streams.

    The thread starts with the first deadline and exits when idle. Arming a deadline costs a lock
    and a dictionary entry, which is cheap enough to do for every message.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._armed: dict[int, tuple[float, Callable[[], None]]] = {}
        self._wakes_at = 0.0
        self._thread: threading.Thread | None = None

    def arm(self, key: int, deadline: float, expire: Callable[[], None]) -> None:
        """Call ``expire`` once at the deadline, on the watchdog's thread, unless disarmed first.

        Args:
            key: Identifies the deadline; a second deadline with the same key replaces the first.
            deadline: In ``time.monotonic()`` seconds; infinity never expires.
            expire: A function that must neither block nor raise.
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
        """Remove a deadline if still armed."""
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
