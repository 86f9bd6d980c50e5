"""Code shared by RunnerProcess and AsyncRunnerProcess: everything but the calls.

``ProcessBase`` owns the child at every stage. Its methods block and are thread-safe; the
asyncio class runs them in threads.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

from runner_client.errors import RunnerTimeoutError, RunnerUnavailableError
from runner_client.host.command import ListenAddress
from runner_client.process.launch import Launch
from runner_client.types import DeviceInfo, LoadOptions, RestartPolicy, Timeouts
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from runner_client.host.command import Listen
    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.memory.gate import MemoryGate
    from runner_client.process.child import Child
    from runner_client.process.launch import Plan
    from runner_client.types import LoadKeywords, Status
    from runner_common.handshake import ReadyLine

logger = logging.getLogger(__name__)

HEALTH_SECONDS = 0.05
"""Interval between health checks of a new child."""


@dataclass(frozen=True)
class Ending:
    """The objects released by one ``close``, and none of a later child."""

    life: int
    child: Child | None
    listen_address: ListenAddress | None
    plan: Plan | None


class ProcessBase:
    """Owner of the child process and of the last known status.

    A runner may own one child after another. Each child's life has a number, and lasts from a
    start to a close. A failed start only ends its own life: another thread may already have
    closed it and started the next.
    """

    def __init__(
        self,
        model: str,
        *,
        options: LoadOptions | None = None,
        require_full: bool = False,
        gate: MemoryGate | None = None,
        timeouts: Timeouts | None = None,
        restart_policy: RestartPolicy | None = None,
        listen: Listen = "tcp",
        blas: str = "auto",
        env: Mapping[str, str] | None = None,
        log: logging.Logger | None = None,
        **keywords: Unpack[LoadKeywords],
    ) -> None:
        self._launch = Launch(
            model=model,
            options=LoadOptions.of(options, keywords),
            require_full=require_full,
            gate=gate,
            listen=listen,
            blas=blas,
            env=env,
            log=log,
        )
        self._timeouts = timeouts or Timeouts()
        self._restart_policy = restart_policy or RestartPolicy()
        self._restarts: tuple[float, ...] = ()
        self._lock = threading.Lock()
        self._life = 0
        self._is_started = False
        self._child: Child | None = None
        self._listen_address: ListenAddress | None = None
        self._ready: ReadyLine | None = None
        self._plan: Plan | None = None
        self._status: Status | None = None

    def __repr__(self) -> str:
        name, model = type(self).__name__, self._launch.model
        return f"<{name} {model!r} pid={self.pid} address={self.address!r}>"

    @property
    def timeouts(self) -> Timeouts:
        """The timeouts for the child and for calls."""
        return self._timeouts

    @property
    def pid(self) -> int | None:
        """The child's process id; None before the start. Kept after the exit."""
        return self._child.pid if self._child else None

    @property
    def port(self) -> int | None:
        """The child's TCP port; None until the child is ready, or with a unix socket."""
        return self._ready.port if self._ready else None

    @property
    def address(self) -> str | None:
        """The child's address, as passed to gRPC; None until the child is ready."""
        return self._ready.target if self._ready else None

    @property
    def token(self) -> str | None:
        """The token required by the child, for use by additional clients.

        Each child gets a new one, so that other users of the machine cannot call it. None until
        the gate has admitted the model.
        """
        return self._plan.token if self._plan else None

    @property
    def has_exited(self) -> bool:
        """True once a started child has exited."""
        return self._child is not None and self._child.has_exited

    @property
    def exit_code(self) -> int | None:
        """The child's exit code; a negative value is the number of a signal.

        None while the child runs, and if other code in this process has reaped it.
        """
        return self._child.exit_code if self._child else None

    @property
    def model_path(self) -> str:
        """The model's directory; before the gate has run, the ``model`` argument."""
        return self._plan.estimate.path if self._plan else self._launch.model

    @property
    def estimate(self) -> MemoryEstimate | None:
        """The estimate checked by the gate; None before ``load``."""
        return self._plan.estimate if self._plan else None

    @property
    def context_length(self) -> int:
        """The longest accepted sequence, in tokens, as of the last status; 0 without one."""
        return self._status.context_length if self._status else 0

    @property
    def memory_size(self) -> int:
        """Memory held by MLX, in bytes, as of the last status; at first the estimated weights."""
        if self._status is not None:
            return self._status.memory_bytes
        return self._plan.estimate.weight_bytes if self._plan else 0

    def vram_by_gpu(self, device_id: int = 0) -> int:
        """Return the memory held by MLX on a GPU, in bytes, as of the last status.

        Args:
            device_id: Index of the GPU. MLX uses the first one only, so the result is 0 for
                others, and for all of them if MLX computes on a CPU.
        """
        devices = [device for device in self.device_infos if device.kind == "gpu"]
        return devices[device_id].memory_bytes if 0 <= device_id < len(devices) else 0

    @property
    def device_infos(self) -> tuple[DeviceInfo, ...]:
        """The devices used by the runner, as of the last status; empty without one."""
        if self._status is None or not self._status.device:
            return ()
        kind, _, name = self._status.device.partition(": ")
        return (DeviceInfo(kind, name, self._status.memory_bytes),)

    def _begin_life(self) -> int:
        """Begin a life, to be ended by ``close``, and return the number."""
        with self._lock:
            if self._is_started:
                raise RunnerUnavailableError("this runner is already started; close it first")
            self._is_started = True
            self._child = self._listen_address = self._ready = self._plan = self._status = None
            return self._life

    @contextlib.contextmanager
    def _in_life(self, life: int) -> Iterator[None]:
        """Keep a life from being closed while the block runs.

        Raises:
            RunnerUnavailableError: The life is already closed; the block does not run.
        """
        with self._lock:
            if self._life != life:
                raise RunnerUnavailableError("the runner was closed while it was starting")
            yield

    def _start_child(self, life: int) -> tuple[Plan, Child, ReadyLine]:
        """Estimate, admit, spawn, and wait for the ready line."""
        plan = self._launch.plan()
        child = self._adopt(plan, life)
        reservation = plan.admission.reservation
        child.start()
        if child.pid is not None:
            reservation.assign(child.pid)
        child.on_exit(reservation.release)
        ready = child.wait_ready(self.timeouts.start_seconds)
        with self._in_life(life):
            self._ready = ready
        logger.info("runner (pid %s) listens on %s", child.pid, ready.target)
        return plan, child, ready

    def _adopt(self, plan: Plan, life: int) -> Child:
        """Register the child before the start, where ``close`` finds it."""
        with contextlib.ExitStack() as undo:
            undo.callback(plan.admission.reservation.release)
            with self._in_life(life):
                listen_address = ListenAddress.make(self._launch.listen)
                undo.callback(listen_address.remove)
                self._child = child = plan.child(listen_address)
                self._plan, self._listen_address = plan, listen_address
                undo.pop_all()
        # A runner that is dropped without a close leaves no child behind.
        weakref.finalize(self, child.abandon)
        return child

    def _begin_close(self, life: int | None) -> Ending | None:
        """End a life, or the current one if None; return None if already over."""
        with self._lock:
            if life is not None and self._life != life:
                return None
            self._life += 1
            return Ending(self._life, self._child, self._listen_address, self._plan)

    def _close_child(self, ending: Ending) -> None:
        """Stop the child at any stage, and return once the child is reaped."""
        try:
            if ending.child is not None:
                ending.child.close(self.timeouts.close_grace_seconds(self.memory_size))
        finally:
            if ending.listen_address is not None:
                ending.listen_address.remove()
            if ending.plan is not None:
                # For a child that was never started; the exit of a started one releases it earlier.
                ending.plan.admission.reservation.release()
            with self._lock:
                if self._life == ending.life:
                    self._is_started = False

    def _count_restart(self) -> None:
        now = time.monotonic()
        policy = self._restart_policy
        if not policy.allows(self._restarts, now):
            raise RunnerUnavailableError(
                f"the runner was already restarted {policy.max_restarts} times within "
                f"{policy.window_seconds:g} s. Its log says why it exited"
            )
        self._restarts = (*policy.recent(self._restarts, now), now)

    def _note_loaded(self, status: Status) -> None:
        """Record the status, and log the estimate's deviation from the measured peak."""
        self._status = status
        if self._plan is None:
            return
        need = self._plan.estimate
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


def start_limit(timeouts: Timeouts) -> float:
    """Return the time limit for a child to serve, in seconds; infinity if unlimited."""
    return math.inf if timeouts.start_seconds is None else timeouts.start_seconds


def not_serving(address: str, timeouts: Timeouts) -> RunnerTimeoutError:
    """Return the error for a child with a ready line but without a healthy server."""
    return RunnerTimeoutError(
        f"the runner at {address} did not report SERVING within "
        f"{start_limit(timeouts):g} s. Look at its log, or raise Timeouts.start_seconds",
        phase="start",
        timeout_seconds=timeouts.start_seconds,
    )


def not_started() -> RunnerUnavailableError:
    """Return the error for calling a runner before the start."""
    return RunnerUnavailableError("the runner was not started: call load() first")
