"""One life of a runner's child, from the start to the end of the close."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from runner_client.errors import RunnerUnavailableError
from runner_client.host.command import ListenAddress
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runner_client.process.child import Child
    from runner_client.process.launch import Launch, Plan
    from runner_client.types import Status, Timeouts
    from runner_common.handshake import ReadyLine

logger = logging.getLogger(__name__)

ConnectionT = TypeVar("ConnectionT")
"""The ``Connection`` of ``supervision`` or of ``aio_supervision``."""


class ChildLife(Generic[ConnectionT]):
    """Everything that one start creates and that one close releases. Thread-safe.

    A runner has one life after another. Each step of a start and of a close acts on the life it
    was begun for, so it cannot harm a child that another thread has started meanwhile.

    A start, and its close::

        life = ChildLife(launch, timeouts)
        plan, child, ready = life.start()  # estimate, reserve memory, spawn, wait until ready
        life.close()                       # stop and reap the child, release the memory

    ``start`` raises if any step fails. The owner then closes the life all the same, which releases
    what exists by then: reservation, folder of the socket, child.

    A close from another thread overtakes a start::

        thread A                            thread B
        life.start(): estimates the need
                                            life.close(): returns, there is no child yet
                                            newer = ChildLife(...); newer.start()
        life.start(): is refused the child
        and raises, memory is released
        life.close(): nothing left to do
                                            newer.child runs on

    Attributes:
        is_over: True once a close is complete, so that the next life may begin.
        plan: The launch admitted by the gate; None before that.
        child: The child; None until the launch is admitted. Kept after the exit, like the rest.
        ready: The child's ready line; None before it is printed.
        connection: The owner's connection to the child; None until the child serves.
        status: The last known status; None before the first.

    Args:
        launch: What to start.
        timeouts: How long to wait for the child.
    """

    def __init__(self, launch: Launch, timeouts: Timeouts) -> None:
        self._launch = launch
        self._timeouts = timeouts
        self._lock = threading.Lock()
        self._is_closed = False
        self._listen_address: ListenAddress | None = None
        self.is_over = False
        self.plan: Plan | None = None
        self.child: Child | None = None
        self.ready: ReadyLine | None = None
        self.connection: ConnectionT | None = None
        self.status: Status | None = None

    @classmethod
    def over(cls, launch: Launch, timeouts: Timeouts) -> Self:
        """Return a life that is already over, for a runner before the first start."""
        life = cls(launch, timeouts)
        life.close()
        return life

    @property
    def memory_bytes(self) -> int:
        """Memory held by MLX as of the last status; at first the estimated weights."""
        if self.status is not None:
            return self.status.memory_bytes
        return self.plan.estimate.weight_bytes if self.plan else 0

    @contextlib.contextmanager
    def kept_open(self) -> Iterator[None]:
        """Keep this life from being closed while the block runs.

        Raises:
            RunnerUnavailableError: The life is already closed; the block does not run.
        """
        with self._lock:
            if self._is_closed:
                raise RunnerUnavailableError("the runner was closed while it was starting")
            yield

    def start(self) -> tuple[Plan, Child, ReadyLine]:
        """Estimate, admit, spawn, and wait for the ready line. Blocks.

        Raises:
            RunnerUnavailableError: The life was closed meanwhile.
            RunnerError: A step failed. The caller must still close the life.
        """
        plan = self._launch.plan()
        child = self._adopt(plan)
        reservation = plan.admission.reservation
        child.start()
        if child.pid is not None:
            reservation.assign(child.pid)
        child.on_exit(reservation.release)
        ready = child.wait_ready(self._timeouts.start_seconds)
        with self.kept_open():
            self.ready = ready
        logger.info("runner (pid %s) listens on %s", child.pid, ready.target)
        return plan, child, ready

    def _adopt(self, plan: Plan) -> Child:
        """Create the child, and register it before the start so that ``close`` finds it."""
        with contextlib.ExitStack() as undo:
            undo.callback(plan.admission.reservation.release)
            with self.kept_open():
                listen_address = ListenAddress.make(self._launch.listen)
                undo.callback(listen_address.remove)
                self.child = child = plan.child(listen_address)
                self.plan, self._listen_address = plan, listen_address
                undo.pop_all()
        # A runner that is garbage collected without a close leaves no child behind.
        weakref.finalize(self, child.abandon)
        return child

    def admit(self, launch: Launch) -> Plan | None:
        """Admit a model to the child, which was started without one. Blocks.

        Args:
            launch: What to load, with the parameters of the child's start.

        Returns:
            The plan of the load. None if a new child is necessary: this one is gone, or a new one
            would have another command line or environment.

        Raises:
            RunnerUnavailableError: The life was closed meanwhile.
            RunnerError: The model is refused. The caller must still close the life.
        """
        plan, child, listen_address = self.plan, self.child, self._listen_address
        if plan is None or child is None or listen_address is None or child.has_exited:
            return None
        if not plan.child(listen_address).equals(child):
            return None
        admitted = launch.plan(plan.admission.reservation)
        with self.kept_open():
            self._launch = launch
            self.plan = replace(admitted, token=plan.token)
        return self.plan

    def begin_close(self) -> None:
        """Make every further step of the start fail. Returns at once."""
        with self._lock:
            self._is_closed = True

    def close(self) -> None:
        """Stop the child at any stage, and return once the child is reaped. Blocks.

        May be called at any time, from any thread, and repeatedly.
        """
        self.begin_close()
        try:
            if self.child is not None:
                self.child.close(self._timeouts.close_grace_seconds(self.memory_bytes))
        finally:
            if self._listen_address is not None:
                self._listen_address.remove()
            if self.plan is not None:
                # For a child that was never started; the exit of a started one releases it earlier.
                self.plan.admission.reservation.release()
            self.is_over = True

    def kill(self) -> None:
        """Kill the child if running. Returns at once."""
        if self.child is not None:
            self.child.kill()

    def require_connection(self) -> ConnectionT:
        """Return the connection to the serving child.

        Raises:
            RunnerUnavailableError: The child does not serve yet, or there is none.
        """
        if self.connection is not None:
            return self.connection
        if self.is_over:
            raise RunnerUnavailableError("the runner was not started: call load() first")
        raise RunnerUnavailableError("the runner is still starting: wait until load() returns")

    def note_loaded(self, status: Status) -> None:
        """Record the first status after a load, and log how far the estimate was from the peak."""
        self.status = status
        if self.plan is None:
            return
        need = self.plan.estimate
        if status.model and status.model.dtype_fallback:
            logger.warning(
                "%s is held as stored, which is slow on a CPU: not enough memory for float32",
                need.path,
            )
        counted = need.weight_bytes + need.load_transient_bytes
        peak = status.memory_usage.peak_bytes
        logger.info(
            "loaded %s: peak %s, estimated %s (%+.0f %%), with KV cache and margin %s",
            need.path,
            format_bytes(peak),
            format_bytes(counted),
            100 * (counted - peak) / peak if peak else 0.0,
            format_bytes(need.total_bytes),
        )
