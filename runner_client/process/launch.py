"""Preparation of a child: check the platform, estimate, admit, and build the command."""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from runner_client.errors import InsufficientMemoryError
from runner_client.host.command import (
    ListenAddress,
    check_platform,
    server_command,
)
from runner_client.host.environment import child_environment
from runner_client.memory.estimation import estimate, estimate_bare
from runner_client.memory.gate import MemoryGate
from runner_client.memory.model import find_model
from runner_client.process.child import Child
from runner_common.contract import TOKEN_VARIABLE, USE_TOKEN_VARIABLE
from runner_common.memory.reservations import DIRECTORY_VARIABLE
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner_client.host.command import Listen
    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.memory.gate import Admission
    from runner_client.types import LoadOptions
    from runner_common.memory.reservations import Reservation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Launch:
    """Parameters of a child's start."""

    model: str
    options: LoadOptions
    require_full: bool
    gate: MemoryGate | None
    listen: Listen
    blas: str
    env: Mapping[str, str] | None
    log: logging.Logger | None

    def environ(self) -> dict[str, str]:
        """Return the child's environment: a copy of this process's, updated with ``env``.

        A token for use is not inherited: it would open the child to the holders of this process's.
        """
        inherited = {
            name: value for name, value in os.environ.items() if name != USE_TOKEN_VARIABLE
        }
        return {**inherited, **(self.env or {})}

    def plan(self, running: Reservation | None = None) -> Plan:
        """Decide whether the model may be started, without starting anything.

        ``"auto"`` is float32 on a CPU, and is refused if that does not fit; ``"auto_or_stored"``
        falls back to the stored format instead. An override applies after the fallback, to the
        smallest need, because it is for models that fit in no other way. With ``require_full``
        nothing falls back, so that a scheduler evicts another runner.

        Args:
            running: The reservation of the child that will load the model, if it runs already.

        Raises:
            UnsupportedPlatformError: MLX does not run here.
            ModelNotFoundError: The model does not exist.
            ModelUnsupportedError: The model's files are damaged or incomplete.
            InvalidRequestError: An option is out of range for the model.
            InsufficientMemoryError: The model does not fit into memory.
        """
        check_platform()
        options = self.options
        falls_back = options.dtype == "auto_or_stored" and not self.require_full
        try:
            need = estimate(self.model, options=options, env=self.environ(), blas=self.blas)
            falls_back = falls_back and need.dtype != "as_stored"
            override = options.memory_override and not falls_back
            return self._gated(need, override=override, running=running)
        except InsufficientMemoryError as error:
            if options.dtype not in ("auto", "auto_or_stored"):
                raise
            if not falls_back:
                raise self._with_advice(error) from None
            logger.warning("%s. Loading it as stored if that fits", error)
        return self._gated(self._stored(), override=options.memory_override, running=running)

    def _stored(self) -> MemoryEstimate:
        """Estimate the model as stored."""
        options = replace(self.options, dtype="as_stored")
        return estimate(self.model, options=options, env=self.environ(), blas=self.blas)

    def _with_advice(self, error: InsufficientMemoryError) -> InsufficientMemoryError:
        """Return the same refusal, with advice on the stored format if stored would fit."""
        try:
            stored = self._stored()
        except InsufficientMemoryError:
            # The memory limit is too low for this format, too.
            return error
        # A refusal by the limit has no overhead, and its need is that of MLX alone.
        by_gate = error.overhead_bytes is not None
        if by_gate and stored.required_bytes >= (error.required_bytes or 0):
            return error
        gate = self.gate or MemoryGate(environ=self.environ())
        return _advised(error, stored) if gate.check(stored, override=True).fits else error

    def _gated(self, need: MemoryEstimate, *, override: bool, running: Reservation | None) -> Plan:
        environ = self.environ()
        gate = self.gate or MemoryGate(environ=environ)
        admission = gate.admit(
            need,
            require_full=self.require_full,
            override=override,
            environ=environ,
            running=running,
        )
        return Plan(self, need, admission, gate.book(environ).directory)


@dataclass(frozen=True)
class BareLaunch(Launch):
    """Parameters of the start of a child without a model."""

    @classmethod
    def like(cls, launch: Launch) -> Self:
        """Return the parameters of the same child without a model."""
        return cls(**{each.name: getattr(launch, each.name) for each in fields(launch)})

    def plan(self, running: Reservation | None = None) -> Plan:
        """Decide whether the child may be started.

        Raises:
            UnsupportedPlatformError: MLX does not run here.
            InsufficientMemoryError: There is no memory for the process itself.
        """
        check_platform()
        return self._gated(estimate_bare(), override=False, running=running)


def _advised(error: InsufficientMemoryError, stored: MemoryEstimate) -> InsufficientMemoryError:
    """Return the same refusal with the alternatives to float32 appended."""
    return type(error)(
        f"{error}. As stored it would need {format_bytes(stored.required_bytes)}, but be many "
        'times slower on a CPU: use dtype "as_stored", or dtype "auto_or_stored" to fall back only '
        "if memory is short. To hold it as float32, evict another runner",
        required_bytes=error.required_bytes,
        available_bytes=error.available_bytes,
        overhead_bytes=error.overhead_bytes,
    )


@dataclass(frozen=True)
class Plan:
    """A launch admitted by the gate."""

    launch: Launch
    estimate: MemoryEstimate
    admission: Admission
    """The gate's decision, and the memory reserved for the child until its exit."""
    directory: Path
    """The directory of this machine's reservations."""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    """The token that the child requires from its callers."""

    @property
    def model(self) -> str:
        """The model to load: the hub id, which the server uses as the name, or the directory."""
        is_hub_id = find_model(self.launch.model, self.launch.environ()).is_hub_id
        return self.launch.model if is_hub_id else self.estimate.path

    @property
    def options(self) -> LoadOptions:
        """The options of the load, as estimated.

        The server compares the need with free memory again and refuses on its own; an override
        of the gate therefore applies to the server too.
        """
        return replace(
            self.launch.options,
            context_length=self.estimate.context_length,
            parallel=self.estimate.parallel,
            memory_override=self.admission.overridden,
        )

    def child(self, listen_address: ListenAddress) -> Child:
        """Create the child, not yet started.

        Raises:
            InvalidRequestError: ``blas`` names no file, or a path that cannot be preloaded.
            NotSupportedError: The server's packages are not installed.
            RunnerUnavailableError: No Python interpreter is available for the child.
        """
        environment = child_environment(
            self.launch.environ(), backend=self.estimate.backend, blas=self.launch.blas
        )
        return Child(
            server_command(listen_address.argument),
            environment={**environment, **self._variables()},
            log=self.launch.log,
        )

    def _variables(self) -> dict[str, str]:
        """Return the environment variables for the gate's settings and the token.

        The token is not passed on the command line, which every user of the machine can read.
        """
        return {
            **self.admission.headroom.variables(),
            DIRECTORY_VARIABLE: str(self.directory),
            TOKEN_VARIABLE: self.token,
        }
