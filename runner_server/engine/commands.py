"""Commands from the event loop to the engine's thread, and their queue."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from runner_server.engine.embedding.request import AnyRequest
from runner_server.engine.types import LoadSpec, ModelInfo

_T = TypeVar("_T")


@dataclass(eq=False)
class ModelCommand(Generic[_T]):
    """A load or an unload, of which at most one is pending.

    Attributes:
        future: Resolves to the outcome, or to a fault.
        cancelled: Set when the caller no longer waits for the outcome.
    """

    future: Future[_T] = field(default_factory=Future, kw_only=True)
    cancelled: threading.Event = field(default_factory=threading.Event, kw_only=True)


@dataclass(eq=False)
class Load(ModelCommand[ModelInfo]):
    """Replace the model; ``cancelled`` also stops a load under way."""

    spec: LoadSpec


@dataclass(eq=False)
class Unload(ModelCommand[int]):
    """Free the model. The outcome is the number of bytes freed."""


@dataclass(frozen=True)
class Cancel:
    """Finish a request whose reader is gone."""

    request: AnyRequest


@dataclass(frozen=True)
class Resume:
    """Resume a preempted request whose reader has caught up.

    Attributes:
        request_id: The engine's id of the request, rather than the request itself, because its
            output channel holds this command and must not keep the request alive.
    """

    request_id: int


@dataclass(frozen=True)
class LimitPrefixCache:
    """Change the byte budget of the prefix cache."""

    limit_bytes: int


@dataclass(frozen=True)
class Trim:
    """Return freed memory to the system.

    Attributes:
        prefix_cache_bytes: Size to which the prefix cache is evicted first.
        future: Resolves once the memory is returned.
    """

    prefix_cache_bytes: int
    future: Future[None]


@dataclass(frozen=True)
class Stop:
    """Wake the thread after the registry's state has changed to stopping or failed."""


Command = AnyRequest | Load | Unload | Cancel | Resume | LimitPrefixCache | Trim | Stop


class CommandQueue(queue.SimpleQueue[Command]):
    """Commands for the engine's thread, in the order of arrival."""

    def poll(self, timeout_seconds: float = 0.0) -> Command | None:
        """Return the next command; None if none arrives in time."""
        try:
            return self.get(block=timeout_seconds > 0, timeout=timeout_seconds)
        except queue.Empty:
            return None
