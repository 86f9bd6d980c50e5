"""Supervision of a child by threads: client, start and close.

``aio_supervision`` has the same names for the asyncio runner, the source of the sync runner.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, TypeVar

from runner_client.errors import RunnerError, RunnerExitedError
from runner_client.process.base import HEALTH_SECONDS, not_serving
from runner_client.process.stall import StallDetector
from runner_client.rpc.base import STATUS_SECONDS
from runner_client.rpc.client import RunnerClient

if TYPE_CHECKING:
    from collections.abc import Callable

    from mlxrunner.v1 import runner_pb2 as pb
    from runner_client.process.base import Ending
    from runner_client.process.child import Child
    from runner_client.rpc.calls import LoadCall
    from runner_client.types import LoadResult, Status, Timeouts

_Result = TypeVar("_Result")


class ChildClient(RunnerClient):
    """Client of a child, aware of the child's exit."""

    def __init__(self, address: str, token: str, child: Child, timeouts: Timeouts) -> None:
        super().__init__(address, token=token, timeouts=timeouts)
        self._child = child
        # The system closes a dead child's connections, except for those that another process holds
        # open. Closing the client ends the calls on these too.
        child.on_exit(self.close)

    def wait_until_serving(self, deadline: float) -> None:
        """Poll the health service until the child reports SERVING."""
        while not self._is_healthy():
            if self._child.wait_exit(HEALTH_SECONDS):
                raise self._child.gone_error()
            if time.monotonic() > deadline:
                raise not_serving(self.address, self.timeouts)

    def _is_healthy(self) -> bool:
        try:
            return self.is_serving()
        except RunnerExitedError:
            raise
        except RunnerError:
            return False

    def start_watchdog(self) -> None:
        """Kill the child if the engine stalls for ``Timeouts.stall_seconds``, unless None."""
        if self.timeouts.stall_seconds is not None:
            watch = StallDetector(self.timeouts.stall_seconds)
            threading.Thread(
                target=self._watch_engine, args=(watch,), name="runner-stall", daemon=True
            ).start()

    def _watch_engine(self, watch: StallDetector) -> None:
        while not self._child.wait_exit(watch.look_seconds):
            with contextlib.suppress(RunnerError):
                if stall := watch.observe(self._status(STATUS_SECONDS)):
                    self._child.kill(stall)

    def start_load(self, request: pb.LoadRequest) -> LoadCall:
        """Start a load."""
        return self._start_load(request)

    def finish_load(
        self, call: LoadCall, on_progress: Callable[[Status], None] | None
    ) -> LoadResult:
        """Wait for a load started by ``start_load``."""
        return self._finish_load(call, on_progress)

    def _status(self, timeout_seconds: float) -> Status:
        status = super()._status(timeout_seconds)
        self._child.note_memory(status.memory_usage.process_bytes)
        return status

    @property
    def is_gone(self) -> bool:
        """True once the child has exited."""
        return self._child.has_exited

    def end(self, call: LoadCall) -> None:  # noqa: ARG002 - closing ends the call
        """Close the connection of a dead child, and let the call of the load end."""
        self.close()

    def _failure(self, error: BaseException, timeout_seconds: float | None = None) -> RunnerError:
        return self._child.explain(super()._failure(error, timeout_seconds))


def start_blocking(start: Callable[[int], _Result], life: int) -> _Result:
    """Run a function that starts a child."""
    return start(life)


def close_blocking(close: Callable[[Ending], None], ending: Ending) -> None:
    """Run a function that closes a child. An interrupt kills the child."""
    close(ending)
