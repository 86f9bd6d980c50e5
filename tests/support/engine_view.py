"""What an engine holds at one moment: the one place where tests look behind its interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner_server.engine.commands import ModelCommand
    from runner_server.engine.embedding.request import AnyRequest, EmbeddingRequest
    from runner_server.engine.engine import Engine
    from runner_server.engine.generation_request import GenerationRequest


@dataclass(frozen=True)
class EngineView:
    """Snapshot of an engine.

    Attributes:
        requests: The accepted requests, in order of arrival.
        waiting: Requests that the engine's thread has queued.
        admitted: Requests that hold memory, by id.
        running: Admitted requests in the batch.
        preempted: Admitted requests outside the batch.
        resumable: Preempted requests whose readers have caught up.
        embedding: Admitted requests to embed, by id.
        command_count: Commands that the engine's thread has not taken.
        model_command: The load or unload under way.
        trim_count: Trims under way.
        is_stopping: Whether the engine is stopping or dead.
    """

    requests: tuple[AnyRequest, ...]
    waiting: tuple[GenerationRequest, ...]
    admitted: dict[int, GenerationRequest]
    running: tuple[GenerationRequest, ...]
    preempted: tuple[GenerationRequest, ...]
    resumable: tuple[GenerationRequest, ...]
    embedding: dict[int, EmbeddingRequest]
    command_count: int
    model_command: ModelCommand[Any] | None
    trim_count: int
    is_stopping: bool

    @classmethod
    def of(cls, engine: Engine) -> EngineView:
        """Look at an engine. The engine's thread may go on meanwhile."""
        registry, scheduler = engine._registry, engine._engine_thread._scheduler
        return cls(
            requests=tuple(registry._requests.values()),
            waiting=tuple(scheduler.waiting),
            admitted=dict(scheduler.admitted),
            running=tuple(scheduler.running),
            preempted=tuple(scheduler.preempted),
            resumable=tuple(scheduler.resumable),
            embedding=dict(scheduler.embedding),
            command_count=engine._commands.qsize(),
            model_command=registry._model_command,
            trim_count=len(registry._trims),
            is_stopping=registry.is_stopping,
        )

    @property
    def request_count(self) -> int:
        """Number of accepted requests."""
        return len(self.requests)
