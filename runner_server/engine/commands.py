"""What the event loop asks of the engine's thread, and the queue that it goes through."""

from __future__ import annotations

import queue
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.request_registry import Ticket


@dataclass(frozen=True)
class Cancel:
    """Finish a request that has no reader any more."""

    request: GenerationRequest


@dataclass(frozen=True)
class Resume:
    """Resume a preempted request, whose reader has caught up."""

    request: GenerationRequest


@dataclass(frozen=True)
class LimitPrefixCache:
    """Evaluated prompts may take so many bytes from now on."""

    limit_bytes: int


@dataclass(frozen=True)
class Trim:
    """Give freed memory back.

    Attributes:
        prefix_cache_bytes: What evaluated prompts are reduced to first.
        done: Ends when it is back.
    """

    prefix_cache_bytes: int
    done: Future[None]


@dataclass(frozen=True)
class Wake:
    """Nothing but a reason to look at the registry."""


Command = GenerationRequest | Ticket[Any] | Cancel | Resume | LimitPrefixCache | Trim | Wake
CommandQueue = queue.SimpleQueue[Command]
