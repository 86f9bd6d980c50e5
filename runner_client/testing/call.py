"""Calls to a fake runner that wait for something."""

from __future__ import annotations

import math
import threading

import grpc

from runner_client.testing.failure import Failure


class FakeCall:
    """Watcher for the cancellation of a call by the client, and for its abort."""

    def __init__(
        self, context: grpc.ServicerContext, cancelled: threading.Event, request_id: str = ""
    ) -> None:
        self.request_id = request_id
        self.is_over = False
        self._is_aborted = False
        self._context = context
        self._cancelled = cancelled
        self._ended = threading.Event()
        if not context.add_callback(self._end):
            self._end()

    def _end(self) -> None:
        if not self.is_over:
            self._cancelled.set()
        self._ended.set()

    def abort(self) -> bool:
        """End the call; return False if it has ended already."""
        if self._ended.is_set() or self.is_over:
            return False
        self.is_over = self._is_aborted = True
        self._ended.set()
        return True

    def wait(self, seconds: float) -> None:
        """Wait, but end the call if cancelled by the client or aborted meanwhile."""
        if self._ended.wait(None if seconds == math.inf else seconds):
            if self._is_aborted:
                Failure("ABORTED", "the request was ended by an Abort").abort(self._context)
            self._context.abort(grpc.StatusCode.CANCELLED, "the client gave up")
