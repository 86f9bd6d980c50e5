"""Channel of a request with a single result."""

from __future__ import annotations

from typing import Generic, TypeVar

from runner_server.engine.output.base import Channel

_T = TypeVar("_T")


class ResultChannel(Channel, Generic[_T]):
    """Holds the result of a request for the reader.

    Call ``put`` on the engine's thread, and ``result`` on the event loop.
    """

    def __init__(self) -> None:
        super().__init__()
        self._result: _T | None = None

    def put(self, result: _T) -> None:
        """Set the result. No-op after a fault."""
        with self._lock:
            if not self._fault:
                self._result, self._has_end = result, True

    async def result(self) -> _T:
        """Wait for the result.

        Raises:
            RunnerFault: The request failed.
        """
        while True:
            await self._ready.wait()
            self._ready.clear()
            with self._lock:
                if self._fault:
                    raise self._fault
                if self._result is not None:
                    return self._result
