"""Commands from the event loop to the engine's thread, and their queue."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.types import LoadSpec, ModelInfo

_T = TypeVar("_T")


@dataclass(eq=False)
class ModelCommand(Generic[_T]):
    """A load or an unload; one at a time.

    Attributes:
        future: Ends with the outcome, or with a fault.
        cancelled: Set when the caller does not wait for the outcome any more.
    """

    future: Future[_T] = field(default_factory=Future, kw_only=True)
    cancelled: threading.Event = field(default_factory=threading.Event, kw_only=True)


@dataclass(eq=False)
class Load(ModelCommand[ModelInfo]):
    """Replace the model; ``cancelled`` also stops a load under way."""

    spec: LoadSpec


@dataclass(eq=False)
class Unload(ModelCommand[int]):
    """Free the model; the outcome is the number of bytes freed."""


@dataclass(frozen=True)
class Cancel:
    """Finish a request without a reader."""

    request: GenerationRequest


@dataclass(frozen=True)
class Resume:
    """Resume a preempted request, whose reader has caught up.

    Attributes:
        request_id: The engine's id of the request, which its stream must not keep alive.
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
        prefix_cache_bytes: The size to which the prefix cache is reduced first.
        future: Ends when the memory is returned.
    """

    prefix_cache_bytes: int
    future: Future[None]


@dataclass(frozen=True)
class Stop:
    """Wake the thread after the registry's state has changed to stopping or failed."""


Command = GenerationRequest | Load | Unload | Cancel | Resume | LimitPrefixCache | Trim | Stop
CommandQueue = queue.SimpleQueue[Command]
