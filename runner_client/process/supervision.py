"""Supervision of a child by threads: health, stalls, start and close.

``aio_supervision`` has the same names for the asyncio runner, the source of the sync runner.
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner_client.errors import RunnerError, RunnerExitedError
from runner_client.process.base import HEALTH_SECONDS, not_serving
from runner_client.process.stall import StallDetector
from runner_client.rpc.transport.base import STATUS_SECONDS

if TYPE_CHECKING:
    from runner_client.process.child import Child
    from runner_client.process.launch import Plan
    from runner_client.process.life import ChildLife
    from runner_client.rpc.client import RunnerClient
    from runner_client.rpc.load import PendingLoad
    from runner_common.handshake import ReadyLine


class Supervisor:
    """Supervisor of a child and client; closes the client once the child exits."""

    def __init__(self, child: Child, client: RunnerClient) -> None:
        self.child = child
        self.client = client
        # The system closes a dead child's connections, except for those that another process holds
        # open. Closing the client ends the calls on these too.
        child.on_exit(client.close)

    def wait_until_serving(self, deadline: float) -> None:
        """Poll the health service until the child reports SERVING.

        Args:
            deadline: In ``time.monotonic()`` seconds.

        Raises:
            RunnerExitedError: The child exited.
            RunnerTimeoutError: The deadline has passed (phase ``"start"``).
            RunnerUnavailableError: The child was closed.
        """
        while not self._is_healthy():
            if self.child.wait_exit(HEALTH_SECONDS):
                raise self.child.gone_error()
            if time.monotonic() > deadline:
                raise not_serving(self.client.address, self.client.timeouts)

    def _is_healthy(self) -> bool:
        try:
            return self.client.is_serving()
        except RunnerExitedError:
            raise
        except RunnerError:
            return False

    def start_watchdog(self) -> None:
        """Kill the child if the engine stalls for ``Timeouts.stall_seconds``, unless None."""
        stall_seconds = self.client.timeouts.stall_seconds
        if stall_seconds is not None:
            detector = StallDetector(stall_seconds)
            threading.Thread(
                target=self._watch, args=(detector,), name="runner-stall", daemon=True
            ).start()

    def _watch(self, detector: StallDetector) -> None:
        while not self.child.wait_exit(detector.look_seconds):
            with contextlib.suppress(RunnerError):
                status = self.client.status(timeout_seconds=STATUS_SECONDS)
                if stall := detector.observe(status):
                    self.child.kill(stall)


@dataclass(frozen=True)
class Connection:
    """The connection of a runner to its serving child: a supervised client and its load."""

    supervisor: Supervisor
    load: PendingLoad

    @property
    def client(self) -> RunnerClient:
        """The client of the child."""
        return self.supervisor.client

    def end(self) -> None:
        """Close the client of a stopped child, and cancel a pending load."""
        self.client.close()
        self.load.cancel()


def start_blocking(life: ChildLife[Connection]) -> tuple[Plan, Child, ReadyLine]:
    """Start a child and wait for the ready line."""
    return life.start()


def close_blocking(life: ChildLife[Connection]) -> None:
    """Close a child. An interrupt kills the child."""
    life.close()
