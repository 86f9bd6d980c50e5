"""What RunnerProcess and AsyncRunnerProcess share: everything but the calls.

``ProcessBase`` knows the child in every phase. Its methods block and are safe
across threads; the asyncio class runs them in threads.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner_client.errors import RunnerTimeoutError, RunnerUnavailableError
from runner_client.host.command import ListenPlace
from runner_client.process.launch import Launch
from runner_client.types import DeviceInfo, RestartPolicy, Timeouts
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from runner_client.host.command import Listen
    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.memory.gate import MemoryGate
    from runner_client.process.child import Child
    from runner_client.process.launch import Plan
    from runner_client.types import Dtype, Status
    from runner_common.handshake import ReadyLine

logger = logging.getLogger(__name__)

HEALTH_SECONDS = 0.05
"""How long to wait between two questions for the health of a new child."""


@dataclass(frozen=True)
class Ending:
    """What one close has to end, and never a child that comes later."""

    life: int
    child: Child | None
    place: ListenPlace | None
    plan: Plan | None


class ProcessBase:
    """The child, and what is known of it.

    One child after another may belong to it. The life of each has a number: it begins
    with a start and ends with a close. A start that fails ends its own life only: by
    then another thread may have closed it and started the next.
    """

    def __init__(
        self,
        model: str,
        *,
        context_length: int | None = None,
        parallel: int | None = None,
        dtype: Dtype = "auto",
        prefix_cache_bytes: int | None = None,
        require_full: bool = False,
        memory_override: bool = False,
        allow_inexact: bool = False,
        gate: MemoryGate | None = None,
        timeouts: Timeouts | None = None,
        restart_policy: RestartPolicy | None = None,
        listen: Listen = "tcp",
        blas: str = "auto",
        env: Mapping[str, str] | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        self._launch = Launch(
            model=model,
            context_length=context_length,
            parallel=parallel,
            dtype=dtype,
            prefix_cache_bytes=prefix_cache_bytes,
            require_full=require_full,
            memory_override=memory_override,
            allow_inexact=allow_inexact,
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
        self._place: ListenPlace | None = None
        self._ready: ReadyLine | None = None
        self._plan: Plan | None = None
        self._status: Status | None = None

    def __repr__(self) -> str:
        name, model = type(self).__name__, self._launch.model
        return f"<{name} {model!r} pid={self.pid} address={self.address!r}>"

    @property
    def timeouts(self) -> Timeouts:
        """How long this process is waited for, and its calls."""
        return self._timeouts

    @property
    def pid(self) -> int | None:
        """The child's process id; None before it is started. Kept after its end."""
        return self._child.pid if self._child else None

    @property
    def port(self) -> int | None:
        """The TCP port it listens on; None before it is ready, or for a unix socket."""
        return self._ready.port if self._ready else None

    @property
    def address(self) -> str | None:
        """Where it listens, as gRPC takes it; None before it is ready."""
        return self._ready.target if self._ready else None

    @property
    def token(self) -> str | None:
        """What the child asks of its callers: give it to clients of your own.

        Each child gets a new one, so that other users of the machine cannot call it.
        None before the gate has let the model through.
        """
        return self._plan.token if self._plan else None

    @property
    def has_exited(self) -> bool:
        """Whether the child was started and is gone."""
        return self._child is not None and self._child.has_exited

    @property
    def exit_code(self) -> int | None:
        """The child's exit code, negative for a signal's number.

        None while it lives, and if something else in this process has taken it.
        """
        return self._child.exit_code if self._child else None

    @property
    def model_path(self) -> str:
        """The directory of the model; before the gate has found it, as it was given."""
        return self._plan.estimate.path if self._plan else self._launch.model

    @property
    def estimate(self) -> MemoryEstimate | None:
        """What the gate counted; None before ``load``."""
        return self._plan.estimate if self._plan else None

    @property
    def context_length(self) -> int:
        """The longest sequence accepted, in tokens, as of the last status; 0 before."""
        return self._status.context_length if self._status else 0

    @property
    def memory_size(self) -> int:
        """What MLX holds, in bytes, as of the last status; before, the weights' estimate."""
        if self._status is not None:
            return self._status.memory_bytes
        return self._plan.estimate.weight_bytes if self._plan else 0

    def vram_by_gpu(self, device_id: int = 0) -> int:
        """What MLX holds on a GPU, in bytes, as of the last status.

        Args:
            device_id: Counted from 0. MLX uses the first only; others hold nothing,
                and so does a CPU.
        """
        devices = [device for device in self.device_infos if device.kind == "gpu"]
        return devices[device_id].memory_bytes if 0 <= device_id < len(devices) else 0

    @property
    def device_infos(self) -> tuple[DeviceInfo, ...]:
        """The devices it computes on, as of the last status; empty before."""
        if self._status is None or not self._status.device:
            return ()
        kind, _, name = self._status.device.partition(": ")
        return (DeviceInfo(kind, name, self._status.memory_bytes),)

    def _begin_life(self) -> int:
        """Begins a life, which is over when it is closed; returns its number."""
        with self._lock:
            if self._is_started:
                raise RunnerUnavailableError("this runner was started already; close it first")
            self._is_started = True
            self._child = self._place = self._ready = self._plan = self._status = None
            return self._life

    @contextlib.contextmanager
    def _in_life(self, life: int) -> Iterator[None]:
        """Keeps a life from being closed while the block runs.

        Raises:
            RunnerUnavailableError: It was closed; the block does not run.
        """
        with self._lock:
            if self._life != life:
                raise RunnerUnavailableError("the runner was closed while it was starting")
            yield

    def _start_child(self, life: int) -> tuple[Plan, Child, ReadyLine]:
        """Checks, estimates, gates, spawns, and waits for the ready line."""
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
        """Makes the child known before it is started, so that ``close`` finds it."""
        with contextlib.ExitStack() as undo:
            undo.callback(plan.admission.reservation.release)
            with self._in_life(life):
                place = ListenPlace.make(self._launch.listen)
                undo.callback(place.remove)
                self._child = child = plan.child(place)
                self._plan, self._place = plan, place
                undo.pop_all()
        # Who forgets to close leaves no child behind.
        weakref.finalize(self, child.abandon)
        return child

    def _begin_close(self, life: int | None) -> Ending | None:
        """Ends a life, any if None; returns None if it is over already."""
        with self._lock:
            if life is not None and self._life != life:
                return None
            self._life += 1
            return Ending(self._life, self._child, self._place, self._plan)

    def _close_child(self, ending: Ending) -> None:
        """Ends the child in any phase, and returns when it is reaped."""
        try:
            if ending.child is not None:
                ending.child.close(self.timeouts.close_grace_seconds(self.memory_size))
        finally:
            if ending.place is not None:
                ending.place.remove()
            if ending.plan is not None:
                # Of a child that was never started; the end of another has released it.
                ending.plan.admission.reservation.release()
            with self._lock:
                if self._life == ending.life:
                    self._is_started = False

    def _count_restart(self) -> None:
        now = time.monotonic()
        policy = self._restart_policy
        if not policy.allows(self._restarts, now):
            raise RunnerUnavailableError(
                f"the runner was restarted {policy.max_restarts} times within "
                f"{policy.window_seconds:g} s; not again. The log of the runner says why it ends"
            )
        self._restarts = (*policy.recent(self._restarts, now), now)

    def _note_loaded(self, status: Status) -> None:
        """Take note of it, and log how far the estimate was from what the load took."""
        self._status = status
        if self._plan is None:
            return
        need = self._plan.estimate
        if status.model and status.model.dtype_fallback:
            logger.warning(
                "%s is held as stored, which is slow on a CPU: there is no memory for float32",
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
    """How long a child may take to serve, in seconds; infinity if for ever."""
    return math.inf if timeouts.start_seconds is None else timeouts.start_seconds


def not_serving(address: str, timeouts: Timeouts) -> RunnerTimeoutError:
    """The error of a child that printed its ready line and then did not serve."""
    return RunnerTimeoutError(
        f"the runner at {address} did not report that it serves within "
        f"{start_limit(timeouts):g} s. Look at its log, or raise Timeouts.start_seconds",
        phase="start",
        timeout_seconds=timeouts.start_seconds,
    )


def not_started() -> RunnerUnavailableError:
    """The error of calling a runner before it was started."""
    return RunnerUnavailableError("the runner was not started: call load() first")
