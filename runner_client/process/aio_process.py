"""A runner in a child process of one's own, in asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, NoReturn, Self

from runner_client.errors import RunnerError, RunnerExitedError, RunnerUnavailableError
from runner_client.process.base import (
    HEALTH_SECONDS,
    ProcessBase,
    not_serving,
    not_started,
    start_limit,
)
from runner_client.process.stall import StallDetector
from runner_client.rpc.aio_client import AsyncRunnerClient
from runner_client.rpc.base import STATUS_SECONDS, embedding_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence
    from types import TracebackType

    from mlxrunner.v1 import runner_pb2 as pb
    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.process.child import Child
    from runner_client.rpc.aio_stream import AsyncCompletionStream
    from runner_client.types import Completion, LoadResult, Options, Status, Timeouts

    LoadReply = asyncio.Task[pb.LoadResponse]


class _AsyncChildClient(AsyncRunnerClient):
    """A client that knows when its runner is dead."""

    def __init__(self, address: str, token: str, child: Child, timeouts: Timeouts) -> None:
        super().__init__(address, token=token, timeouts=timeouts)
        self._child = child
        self._loop = asyncio.get_running_loop()
        self._closing: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        # A dead child's connections are closed by the system; this ends those too
        # that another process holds open.
        child.on_exit(self._close_soon)

    def _close_soon(self) -> None:
        # A loop that is closed has no calls left.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._begin_close)

    def _begin_close(self) -> None:
        self._closing = self._loop.create_task(self.close())

    async def wait_until_serving(self, deadline: float) -> None:
        """Asks for the health until it is good."""
        while not await self._is_healthy():
            if self._child.has_exited:
                raise self._child.gone_error()
            if time.monotonic() > deadline:
                raise not_serving(self.address, self.timeouts)
            await asyncio.sleep(HEALTH_SECONDS)

    async def _is_healthy(self) -> bool:
        try:
            return await self.is_serving()
        except RunnerExitedError:
            raise
        except RunnerError:
            return False

    def start_watchdog(self) -> None:
        """Kills the child when its engine stands still, if ``Timeouts`` say so."""
        if self.timeouts.stall_seconds is not None:
            watch = StallDetector(self.timeouts.stall_seconds)
            self._watching = self._loop.create_task(self._watch_engine(watch))

    async def _watch_engine(self, watch: StallDetector) -> None:
        while not self._child.has_exited:
            await asyncio.sleep(watch.look_seconds)
            with contextlib.suppress(RunnerError):
                if stall := watch.observe(await self._status(STATUS_SECONDS)):
                    self._child.kill(stall)

    async def close(self) -> None:
        """Closes the connection; see ``AsyncRunnerClient.close``."""
        if self._watching is not None:
            self._watching.cancel()
        await super().close()

    def start_load(self, request: pb.LoadRequest) -> LoadReply:
        """Begins a load."""
        return self._start_load(request)

    async def finish_load(
        self, reply: LoadReply, on_progress: Callable[[Status], None] | None
    ) -> LoadResult:
        """Waits for a load that ``start_load`` began."""
        return await self._finish_load(reply, on_progress)

    async def _status(self, timeout_seconds: float) -> Status:
        status = await super()._status(timeout_seconds)
        self._child.note_memory(status.memory_usage.process_bytes)
        return status

    @property
    def is_gone(self) -> bool:
        """Whether the child has exited."""
        return self._child.has_exited

    async def _failure(
        self, error: BaseException, timeout_seconds: float | None = None
    ) -> RunnerError:
        failure = await super()._failure(error, timeout_seconds)
        if not isinstance(failure, RunnerUnavailableError):
            return failure
        # It may wait a little for the news that the child is dead.
        return await asyncio.to_thread(self._child.explain, failure)


class AsyncRunnerProcess(ProcessBase):
    """Gates, spawns, loads, calls and stops a runner of one's own, in asyncio.

    As an async context manager it is ready inside and gone outside::

        async with AsyncRunnerProcess("org/model") as runner:
            async for chunk in runner.completion("Once upon a time"):
                print(chunk.content, end="")

    It belongs to the event loop that ``load`` runs in, and tasks of that loop may
    share it. What would block the loop (reading the model's headers, spawning,
    reaping) runs in threads. Cancelling a task that loads or enters ends the child;
    cancelling one that closes kills it. All else is as ``RunnerProcess`` has it.

    Args:
        model: A directory, or a hub id in the local Hugging Face cache.
        context_length: The longest sequence, in tokens. Default: the model's own
            limit, at most 4,096.
        parallel: How many completions are decoded together. Default: 4.
        dtype: In which format to hold the weights. ``"auto"`` is float32 on a CPU, and a
            model that does not fit so is refused; ``"auto_or_stored"`` is held as stored
            then, which is many times slower, and ``Model.dtype_fallback`` says so.
        prefix_cache_bytes: The most to keep evaluated prompts in, for others that begin
            alike; part of what the gate counts. 0 keeps none. Default: one sequence, or a
            quarter of all of them; less where memory is short, so that the gate does not
            insist on it.
        require_full: Whether a model that does not fit raises
            ``LoadRequiresFullError`` rather than ``InsufficientMemoryError``, also where
            ``"auto_or_stored"`` would have fitted as stored.
        memory_override: Starts it even if the gate says that it does not fit, and has
            the server load it too. With ``"auto_or_stored"`` it is then held as stored.
        allow_inexact: Starts a model that cannot be computed exactly as its files say;
            ``Model.warnings`` names the differences.
        gate: Decides whether it fits, and keeps what the model may take set aside until
            the child has ended. Default: a ``MemoryGate`` for the child's environment.
        timeouts: How long to wait for what.
        restart_policy: How often ``restart`` may be called.
        listen: ``"tcp"``, a loopback port that the child picks, or ``"unix"``, a
            socket in a new folder that nobody else may enter.
        blas: Which BLAS library goes in front of MLX's own on a Linux CPU: ``"auto"`` (the
            one ``mlx-runner doctor`` found fastest, else OpenBLAS before MKL), ``"off"``, or
            the path of one. A library that ``LD_PRELOAD`` names already stands.
        env: Variables for the child, beside those of this process; the gate reads its own
            from them too.
        log: Takes the lines that the child prints. Default: ``runner_client.child``.
    """

    _running: tuple[_AsyncChildClient, LoadReply] | None = None

    async def load(self) -> MemoryEstimate:
        """Decides whether the model fits, spawns the child and begins the load.

        Returns as soon as the child answers calls and has begun to load;
        ``wait_until_running`` waits for the rest. Leaves nothing behind if it raises.

        Returns:
            What the gate counted.

        Raises:
            RunnerError: It was not started; ``RunnerProcess.load`` lists why.
        """
        async with self._new_life() as life:
            return await self._load(life)

    @contextlib.asynccontextmanager
    async def _new_life(self) -> AsyncIterator[int]:
        """Begins a life, and ends it, if it is not over, if the block raises."""
        life = self._begin_life()
        try:
            yield life
        except BaseException:
            await self._close(life)
            raise

    async def _load(self, life: int) -> MemoryEstimate:
        begin = time.monotonic()
        # The thread cannot be cancelled, but it gives up when its life is over.
        plan, child, ready = await asyncio.to_thread(self._start_child, life)
        client = _AsyncChildClient(ready.target, plan.token, child, self.timeouts)
        await client.wait_until_serving(begin + start_limit(self.timeouts))
        with self._in_life(life):
            self._running = client, client.start_load(plan.load_request())
        client.start_watchdog()
        return plan.estimate

    async def wait_until_running(
        self, on_progress: Callable[[Status], None] | None = None
    ) -> LoadResult:
        """Waits until the load that ``load`` began is done.

        Args:
            on_progress: Called with a status about every 0.2 s.

        Raises:
            RunnerExitedError: The child ended; raised at once.
            RunnerTimeoutError: Nothing moved for ``Timeouts.load_seconds``. The load
                goes on: wait again, or close.
            RunnerError: The load failed in another way.
        """
        client, reply = self._require_running()
        result = await client.finish_load(reply, on_progress)
        self._note_loaded(await client.status())
        return result

    async def status(self) -> Status:
        """Asks what the runner does and holds; properties show it afterwards.

        Raises:
            RunnerError: The call failed.
        """
        status = self._status = await self._client.status()
        return status

    async def ping(self) -> float:
        """Asks for a status; returns how long the answer took, in seconds.

        Raises:
            RunnerError: The call failed.
        """
        begin = time.monotonic()
        await self.status()
        return time.monotonic() - begin

    def completion(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
    ) -> AsyncCompletionStream:
        """Starts a completion, nothing to await: see ``AsyncRunnerClient.completion``.

        Raises:
            RunnerUnavailableError: The runner was not started, or is gone.
        """
        return self._client.completion(
            prompt, options=options, logprobs=logprobs, request_id=request_id
        )

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
    ) -> Completion:
        """Waits for a whole completion: see ``RunnerClient.complete``.

        Raises:
            RunnerError: The completion failed; the class says how.
        """
        return await self._client.complete(
            prompt, options=options, logprobs=logprobs, request_id=request_id
        )

    async def tokenize(self, content: str, *, add_special_tokens: bool = False) -> list[int]:
        """Splits text into token ids: see ``RunnerClient.tokenize``.

        Raises:
            RunnerError: The call failed.
        """
        return await self._client.tokenize(content, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Joins token ids into text: see ``RunnerClient.detokenize``.

        Raises:
            RunnerError: The call failed.
        """
        return await self._client.detokenize(token_ids)

    async def trim(self, *, prefix_cache_bytes: int | None = None) -> int:
        """Have the runner give memory back; return the bytes: see ``RunnerClient.trim``.

        Raises:
            RunnerError: The call failed.
        """
        return await self._client.trim(prefix_cache_bytes=prefix_cache_bytes)

    async def embedding(self, content: str) -> NoReturn:  # noqa: ARG002 - the interface has it
        """Always raises: the runner completes text only.

        Raises:
            NotSupportedError: Always.
        """
        raise embedding_error()

    async def restart(self, on_progress: Callable[[Status], None] | None = None) -> LoadResult:
        """Ends the child if it still runs, starts another, and waits until it runs.

        Raises:
            RunnerUnavailableError: The restart policy allows no more.
            RunnerError: What ``load`` and ``wait_until_running`` raise.
        """
        self._count_restart()
        await self.close()
        await self.load()
        return await self.wait_until_running(on_progress)

    async def close(self) -> None:
        """Asks the child to stop, kills it after the grace time, and reaps it.

        The grace time is ``Timeouts.close_seconds`` and a second more per 4 GiB
        held. May be called in any phase, and again; ``load`` may follow. If its task
        is cancelled it kills at once, and still reaps.
        """
        await self._close()

    async def _close(self, life: int | None = None) -> None:
        ending = self._begin_close(life)
        if ending is None:
            return
        closing = asyncio.create_task(asyncio.to_thread(self._close_child, ending))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            if ending.child is not None:
                ending.child.kill()
            await closing
            raise
        finally:
            await self._close_client()

    async def _close_client(self) -> None:
        # It may be that of a newer child, which runs.
        if self._running is not None and self._running[0].is_gone:
            client, reply = self._running
            await client.close()
            # Takes note of its error, if nobody waited for it.
            await asyncio.gather(reply, return_exceptions=True)

    @property
    def _client(self) -> _AsyncChildClient:
        return self._require_running()[0]

    def _require_running(self) -> tuple[_AsyncChildClient, LoadReply]:
        if self._running is None:
            raise not_started()
        return self._running

    async def __aenter__(self) -> Self:
        async with self._new_life() as life:
            await self._load(life)
            await self.wait_until_running()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
