"""How a client waits, encrypts, and starts its runner again: frozen dataclasses."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike

_GIB = 2**30
_CLOSE_BYTES_PER_SECOND = 4 * _GIB


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long to wait for what, in seconds. None waits for ever.

    Raises:
        ValueError: A value is not above 0.
    """

    start_seconds: float | None = 60.0
    """From the start of a child to its ready line and its first health answer."""
    load_seconds: float | None = 300.0
    """How long a load may stand still. A load that moves has no limit."""
    first_token_seconds: float | None = 600.0
    """From the call of a completion to its first token: queue and prompt."""
    idle_seconds: float | None = 60.0
    """Between two messages of a stream, progress messages included."""
    call_seconds: float = 30.0
    """The deadline of every other call."""
    close_seconds: float = 7.0
    """From the request to stop to the kill; large models get more. The server itself
    drains for up to 5.5 s."""
    stall_seconds: float | None = None
    """How long a child's engine may have completions to work on and not move before the
    child is killed. None never kills. A step lasts tenths of a second, and seconds
    where kernels are compiled first; a slow prompt moves with every step."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{field.name} must be above 0 (or None: no limit), not {value}")

    def close_grace_seconds(self, model_bytes: int) -> float:
        """The grace time of a child that holds this much: a second more per 4 GiB.

        Freeing takes time in proportion, and on macOS killing a process that still
        holds wired memory can strand that memory until a reboot.
        """
        return self.close_seconds + model_bytes / _CLOSE_BYTES_PER_SECOND


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What a client encrypts with: files in PEM, read when the client is made.

    Raises:
        ValueError: One of ``cert`` and ``key`` is missing.
    """

    ca: str | PathLike[str] | None = None
    """Authorities that the server's certificate must come from. None: those gRPC knows."""
    cert: str | PathLike[str] | None = None
    """The client's own certificate, if the server asks for one."""
    key: str | PathLike[str] | None = None
    """The private key of ``cert``."""

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError("a client's certificate needs its key: give both of cert and key")


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """How often a child may be started again; ``RunnerProcess.restart`` asks it.

    Raises:
        ValueError: A value is out of its range.
    """

    max_restarts: int = 3
    """The most restarts within the window; 0 allows none."""
    window_seconds: float = 600.0
    """How long a restart counts."""

    def __post_init__(self) -> None:
        if self.max_restarts < 0 or not self.window_seconds > 0:
            raise ValueError("max_restarts must be at least 0 and window_seconds above 0")

    def recent(self, restarts: tuple[float, ...], now: float) -> tuple[float, ...]:
        """Those of the past restarts (their times, in seconds) that still count."""
        return tuple(time for time in restarts if now - time < self.window_seconds)

    def allows(self, restarts: tuple[float, ...], now: float) -> bool:
        """Whether one more restart is within the bounds."""
        return len(self.recent(restarts, now)) < self.max_restarts
