"""Base class of ``RunnerProcess`` and ``AsyncRunnerProcess``: everything except calls."""

from __future__ import annotations

import logging
import math
import threading
import time
from typing import TYPE_CHECKING, Generic, Unpack

from runner_client.checks import check_environment, check_flag, check_kind, check_model
from runner_client.errors import RunnerTimeoutError, RunnerUnavailableError
from runner_client.process.launch import Launch
from runner_client.process.life import ChildLife, ConnectionT
from runner_client.types import DeviceInfo, LoadOptions, RestartPolicy, Timeouts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from runner_client.errors import RunnerExitedError
    from runner_client.host.command import Listen
    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.memory.gate import MemoryGate
    from runner_client.rpc.transport.base import Peer
    from runner_client.types import LoadKeywords

HEALTH_SECONDS = 0.05
"""Interval between health checks of a new child."""


class ProcessBase(Generic[ConnectionT]):
    """Owner of at most one child at a time, each with a separate ``ChildLife``.

    The properties describe the current life, or the last one if it is over.
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
        check_model(model)
        check_flag("require_full", require_full)
        check_environment("env", env)
        check_kind("timeouts", timeouts, Timeouts)
        check_kind("restart_policy", restart_policy, RestartPolicy)
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
        self._life: ChildLife[ConnectionT] = ChildLife.over(self._launch, self._timeouts)

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
        return child.pid if (child := self._life.child) else None

    @property
    def port(self) -> int | None:
        """The child's TCP port; None until the child is ready, or with a unix socket."""
        return ready.port if (ready := self._life.ready) else None

    @property
    def address(self) -> str | None:
        """The child's address, as passed to gRPC; None until the child is ready."""
        return ready.target if (ready := self._life.ready) else None

    @property
    def token(self) -> str | None:
        """The token required by the child, for use by additional clients.

        Each child gets a new one, so that other users of the machine cannot call it. None until
        the gate has admitted the model.
        """
        return plan.token if (plan := self._life.plan) else None

    @property
    def has_exited(self) -> bool:
        """True once a started child has exited."""
        return (child := self._life.child) is not None and child.has_exited

    @property
    def exit_code(self) -> int | None:
        """The child's exit code; a negative value is the number of a signal.

        None while the child runs, and if other code in this process has reaped it.
        """
        return child.exit_code if (child := self._life.child) else None

    @property
    def exit_error(self) -> RunnerExitedError | None:
        """The error that pending calls raise after the child's exit; None while it runs."""
        return self._life.child.exit_error() if self._life.child and self.has_exited else None

    @property
    def peer(self) -> Peer | None:
        """The child, for additional clients: ``RunnerClient(address, token=..., peer=...)``.

        Their calls then raise ``RunnerExitedError`` if the child dies. None before the start.
        """
        return self._life.child

    def kill(self) -> None:
        """Kill the child if running. Returns at once; ``close`` waits for the exit."""
        self._life.kill()

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Call a function in another thread once the present child has exited, or now if it has.

        Args:
            callback: Must not raise or block.

        Raises:
            RunnerUnavailableError: The runner was not started.
        """
        if self._life.child is None:
            raise RunnerUnavailableError("the runner was not started: call load() first")
        self._life.child.on_exit(callback)

    @property
    def model_path(self) -> str:
        """The model's directory; before the gate has run, the ``model`` argument."""
        return plan.estimate.path if (plan := self._life.plan) else self._launch.model

    @property
    def estimate(self) -> MemoryEstimate | None:
        """The estimate checked by the gate; None before ``load``."""
        return plan.estimate if (plan := self._life.plan) else None

    @property
    def context_length(self) -> int:
        """The longest accepted sequence, in tokens, as of the last status; 0 before the first."""
        return status.context_length if (status := self._life.status) else 0

    @property
    def memory_size(self) -> int:
        """Memory held by MLX, in bytes, as of the last status; at first the estimated weights."""
        return self._life.memory_bytes

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
        """The devices used by the runner, as of the last status; empty before the first."""
        status = self._life.status
        if status is None or not status.device:
            return ()
        kind, _, name = status.device.partition(": ")
        return (DeviceInfo(kind, name, status.memory_bytes),)

    def _begin_life(self) -> ChildLife[ConnectionT]:
        """Begin a life, which the caller closes if the start fails."""
        with self._lock:
            if not self._life.is_over:
                raise RunnerUnavailableError("this runner is already started; close it first")
            self._life = ChildLife(self._launch, self._timeouts)
            return self._life

    def _count_restart(self) -> None:
        now = time.monotonic()
        policy = self._restart_policy
        if not policy.allows(self._restarts, now):
            raise RunnerUnavailableError(
                f"the runner was already restarted {policy.max_restarts} times within "
                f"{policy.window_seconds:g} s. Its log says why it exited"
            )
        self._restarts = (*policy.recent(self._restarts, now), now)


def start_limit(timeouts: Timeouts) -> float:
    """Return the time limit for a child to report SERVING, in seconds; infinity if unlimited."""
    return math.inf if timeouts.start_seconds is None else timeouts.start_seconds


def not_serving(address: str, timeouts: Timeouts) -> RunnerTimeoutError:
    """Return the error for a child that printed a ready line but never reported SERVING."""
    return RunnerTimeoutError(
        f"the runner at {address} did not report SERVING within "
        f"{start_limit(timeouts):g} s. Look at its log, or raise Timeouts.start_seconds",
        phase="start",
        timeout_seconds=timeouts.start_seconds,
    )
