"""Schedulers that answer requests for many models with few in memory at a time."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from bench.contenders import Setup
from bench.contenders.mlx_lm_server import MlxLmServer
from bench.records import ContenderError, Record, Request
from runner_client import (
    AsyncRunnerPool,
    LoadOptions,
    ModelSettings,
    Options,
    PoolSettings,
    RunnerError,
)
from runner_client.memory.estimation import estimate

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

CAPACITY = 2
"""Number of models in memory."""

CONTEXT_LENGTH = 512
OPTIONS = LoadOptions(context_length=CONTEXT_LENGTH)
"""Options of the pool's models: the defaults, with a context as short as the prompts allow."""


class Scheduler(ABC):
    """A scheduler, open within its ``async with`` block.

    Args:
        models: Directory of each model.

    Attributes:
        loads: Number of models loaded so far.
    """

    name: ClassVar[str]

    def __init__(self, models: Mapping[str, Path]) -> None:
        self.models = models
        self.loads = 0

    @abstractmethod
    async def __aenter__(self) -> Self:
        """Start the scheduler, without any model."""

    @abstractmethod
    async def __aexit__(self, *_: object) -> None:
        """Stop every process."""

    @abstractmethod
    async def stream(self, model: str, request: Request, record: Record) -> None:
        """Run a request as ``bench.load.Stream`` does, after loading the model if necessary.

        Raises:
            ContenderError: The request failed.
        """


class NaiveLru(Scheduler):
    """At most two ``mlx_lm server`` processes; the least recently used one makes room.

    A server is stopped once its requests have ended, and one swap runs at a time. Requests for
    running servers do not wait for a swap.
    """

    name = "naive LRU"

    def __init__(self, models: Mapping[str, Path]) -> None:
        super().__init__(models)
        self._servers: dict[str, MlxLmServer] = {}
        self._users: dict[str, int] = dict.fromkeys(models, 0)
        self._idle = asyncio.Condition()
        self._swap = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(server.stop() for server in self._servers.values()))

    async def stream(self, model: str, request: Request, record: Record) -> None:
        """Run a request on the model's server."""
        if model not in self._servers:
            async with self._swap:
                if model not in self._servers:
                    await self._start(model)
        async with self._using(model) as server:
            await server.stream(request, record)

    async def _start(self, model: str) -> None:
        if len(self._servers) >= CAPACITY:
            # In the order of their last use.
            victim = next(iter(self._servers))
            server = self._servers.pop(victim)
            try:
                async with self._idle:
                    await self._idle.wait_for(lambda: not self._users[victim])
            finally:
                await server.stop()
        server = MlxLmServer(Setup(self.models[model], CONTEXT_LENGTH))
        self.loads += 1
        try:
            await server.start()
            await server.probes()["health"]()
        except BaseException:
            await server.stop()
            raise
        self._servers[model] = server

    @asynccontextmanager
    async def _using(self, model: str) -> AsyncIterator[MlxLmServer]:
        server = self._servers.pop(model)
        self._servers[model] = server
        self._users[model] += 1
        try:
            yield server
        finally:
            self._users[model] -= 1
            async with self._idle:
                self._idle.notify_all()


class Pool(Scheduler):
    """``AsyncRunnerPool`` with a budget for the two largest models."""

    name = "RunnerPool"
    min_residence_seconds: ClassVar[float] = PoolSettings().min_residence_seconds

    async def __aenter__(self) -> Self:
        needs = [await asyncio.to_thread(_need, path) for path in self.models.values()]
        settings = PoolSettings(
            budget_bytes=sum(sorted(needs)[-CAPACITY:]),
            default=ModelSettings(options=OPTIONS),
            min_residence_seconds=self.min_residence_seconds,
        )
        self._pool = await AsyncRunnerPool(settings).__aenter__()
        self._counting = asyncio.create_task(self._count_loads())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._pool.close()
        await self._counting

    async def _count_loads(self) -> None:
        pids: set[int | None] = set()
        async for status in self._pool.watch():
            pids |= {model.pid for model in status.models}
            self.loads = len(pids - {None})

    async def stream(self, model: str, request: Request, record: Record) -> None:
        """Run a request on the model's runner."""
        options = Options(temperature=0, num_predict=request.max_tokens)
        try:
            async with (
                self._pool.runner(str(self.models[model])) as runner,
                runner.completion(request.prompt.token_ids, options=options) as chunks,
            ):
                async for chunk in chunks:
                    if chunk.token_ids:
                        record.chunks.append((time.monotonic(), len(chunk.token_ids)))
                        record.completion_tokens += len(chunk.token_ids)
                    if chunk.done:
                        record.prompt_tokens = chunk.prompt_eval_count
        except RunnerError as error:
            raise ContenderError(f"{type(error).__name__}: {error}") from error


class EagerPool(Pool):
    """The same, which may evict a model as soon as it is idle."""

    name = "RunnerPool, no residence"
    min_residence_seconds = 0.0


SCHEDULERS: tuple[type[Scheduler], ...] = (NaiveLru, Pool, EagerPool)


def _need(path: Path) -> int:
    return estimate(str(path), options=OPTIONS).total_bytes
