"""From a model's name to a child that is told to load it: check, estimate, gate, start."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlxrunner.handshake import TOKEN_VARIABLE
from runner_client._child import Child
from runner_client._command import (
    ListenPlace,
    check_platform,
    server_command,
    with_import_paths,
)
from runner_client._messages import load_request
from runner_client.environment import child_environment
from runner_client.errors import InsufficientMemoryError
from runner_client.estimate import DEFAULT_PARALLEL, estimate
from runner_client.gate import MemoryGate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlxrunner.v1 import runner_pb2 as pb
    from runner_client._command import Listen
    from runner_client.estimate import MemoryEstimate
    from runner_client.gate import GateDecision
    from runner_client.types import Dtype

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """What a child is to be: everything its start depends on."""

    model: str
    context_length: int | None
    parallel: int | None
    dtype: Dtype
    prefix_cache_bytes: int | None
    require_full: bool
    memory_override: bool
    gate: MemoryGate | None
    listen: Listen
    blas: str
    env: Mapping[str, str] | None
    log: logging.Logger | None

    def plan(self) -> Plan:
        """Decides whether the model may be started, without starting anything.

        ``"auto"`` is float32 on a CPU only where memory allows, else as stored, and
        an override leaves it so: it is for what does not fit in any other way, and
        asks for the smallest. Who wants float32 all the same asks for float32.

        Raises:
            UnsupportedPlatformError: MLX does not run here.
            ModelNotFoundError: There is no such model.
            ModelUnsupportedError: Its files are damaged or incomplete.
            InsufficientMemoryError: It does not fit.
        """
        check_platform()
        try:
            return _gated(self, override=self.memory_override and self.dtype != "auto")
        except InsufficientMemoryError as error:
            plan = self._plan_as_stored()
            if plan is None:
                raise
            logger.warning("%s. It is loaded as it is stored", error)
            return plan

    def _plan_as_stored(self) -> Plan | None:
        if self.dtype != "auto":
            return None
        with contextlib.suppress(InsufficientMemoryError):
            return _gated(replace(self, dtype="as_stored"), override=self.memory_override)
        return None


def _gated(launch: Launch, *, override: bool) -> Plan:
    need = estimate(
        launch.model,
        context_length=launch.context_length,
        parallel=DEFAULT_PARALLEL if launch.parallel is None else launch.parallel,
        dtype=launch.dtype,
        prefix_cache_bytes=launch.prefix_cache_bytes,
    )
    gate = launch.gate or MemoryGate()
    reservation = contextlib.ExitStack()
    decision = reservation.enter_context(
        gate.reserve(need, require_full=launch.require_full, override=override)
    )
    return Plan(launch, need, decision, reservation)


@dataclass(frozen=True)
class Plan:
    """A launch that the gate let through."""

    launch: Launch
    estimate: MemoryEstimate
    decision: GateDecision
    reservation: contextlib.ExitStack
    """What the gate sets aside until the model is loaded, or will not be."""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    """What the child asks of its callers."""

    def load_request(self) -> pb.LoadRequest:
        """What the child is to load: just what the gate counted.

        The server measures by itself what is free, and refuses by that; a caller who
        has overridden the gate has overridden the server too.
        """
        # The server would not expand "~", and names a hub model by its id.
        is_folder = Path(self.launch.model).expanduser().is_dir()
        return load_request(
            self.estimate.path if is_folder else self.launch.model,
            context_length=self.estimate.context_length,
            parallel=self.estimate.parallel,
            dtype=self.launch.dtype,
            memory_limit_bytes=self._limit_bytes(),
            prefix_cache_bytes=self.launch.prefix_cache_bytes,
        )

    def _limit_bytes(self) -> int | None:
        """What the model may take, in bytes; None lets the server measure."""
        if not self.decision.overridden:
            return None
        # The gate keeps some of the free memory back: never less than all of it.
        return max(self.estimate.total_bytes, self.decision.free.available_bytes)

    def child(self, place: ListenPlace) -> Child:
        """Makes the child, not yet started.

        Raises:
            InvalidRequestError: ``blas`` is the path of no file.
            NotSupportedError: The server's packages are not installed.
            RunnerUnavailableError: There is no Python to start it with.
        """
        base = {**os.environ, **(self.launch.env or {})}
        environment = child_environment(base, backend=self.estimate.backend, blas=self.launch.blas)
        # Not on the command line, which every user of the machine can read.
        return Child(
            server_command(place.argument),
            environment={**with_import_paths(environment), TOKEN_VARIABLE: self.token},
            log=self.launch.log,
        )
