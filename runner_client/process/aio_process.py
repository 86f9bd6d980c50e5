"""Asyncio runner in a child process."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Literal, Self

from runner_client.process.aio_supervision import (
    Connection,
    Supervisor,
    close_blocking,
    start_blocking,
)
from runner_client.process.base import ProcessBase, start_limit
from runner_client.rpc.aio_client import AsyncRunnerClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence
    from types import TracebackType

    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.process.launch import Plan
    from runner_client.process.life import ChildLife
    from runner_client.rpc.aio_stream import AsyncChatStream, AsyncCompletionStream
    from runner_client.types import (
        ChatMessage,
        Completion,
        Constraint,
        Embedding,
        LoadResult,
        Options,
        Status,
        Tool,
    )


class AsyncRunnerProcess(ProcessBase[Connection]):
    """A runner in a child process: check memory, then spawn, load, call and stop, in asyncio.

    As an async context manager, it loads the model on entry and stops the child on exit::

        async with AsyncRunnerProcess("org/model") as runner:
            async for chunk in runner.completion("Once upon a time"):
                print(chunk.content, end="")

    Without the context manager, call ``load()``, which checks memory and spawns the child, then
    ``wait_until_running()``, and always ``close()`` in the end. The child requires a new random
    token, so additional clients need it: ``RunnerClient(runner.address, token=runner.token)``.

    A runner belongs to the event loop that runs ``load``; tasks on that loop may share it.
    Blocking work (reading the model's headers, spawning, reaping) runs in threads. Cancelling
    a task in ``load`` or on entry stops the child, and cancelling one in ``close`` kills it.
    Calls that are pending when the runner is closed raise ``RunnerUnavailableError``; if the
    child dies, they raise ``RunnerExitedError``.

    If this process dies in any way, the child exits within 2 s; a fork that outlives this process
    delays that by half a second. A runner does not survive a fork, because gRPC does not: a
    forked copy of this process must not use it.

    Args:
        model: A directory, or a hub id in the local Hugging Face cache.
        options: Options of the load and of the gate's estimate. ``memory_override`` overrides the
            gate, too; a model that does not fit is then held as stored if ``dtype`` is
            ``"auto_or_stored"``.
        require_full: Raise ``LoadRequiresFullError`` instead of ``InsufficientMemoryError`` if the
            model does not fit, and never fall back to the stored format.
        gate: Checks memory and keeps the model's memory reserved until the child exits. Default:
            a ``MemoryGate`` for the child's environment.
        timeouts: How long to wait for the child and for each kind of call.
        restart_policy: How often ``restart`` may be called.
        listen: ``"tcp"``, a loopback port chosen by the child, or ``"unix"``, a socket in a new
            folder that only this user may enter.
        blas: The BLAS library to preload before MLX's own on a Linux CPU: ``"auto"`` (the fastest
            found by ``mlx-runner doctor``, otherwise OpenBLAS before MKL), ``"off"``, or a path.
            A library already in ``LD_PRELOAD`` takes precedence.
        env: Environment variables for the child, in addition to those of this process; the gate
            reads them too.
        log: Logger for the child's output. Default: ``runner_client.child``.
        keywords: Fields of ``LoadOptions``, in place of those of ``options``.

    Raises:
        TypeError: An argument is of the wrong type.
        InvalidRequestError: A load option is out of range.
    """

    @property
    def client(self) -> AsyncRunnerClient:
        """The client of the child, for every call. Each start creates a new one.

        ``completion``, ``complete``, ``tokenize`` and others are on this object, too.

        Raises:
            RunnerUnavailableError: The runner was not started.
        """
        return self._life.require_connection().client

    async def load(self) -> MemoryEstimate:
        """Check memory, spawn the child and start the load.

        Returns once the child answers calls and the load has started; ``wait_until_running``
        waits for the model. An error leaves no child and no reservation behind.

        Returns:
            The estimate that the gate checked.

        Raises:
            UnsupportedPlatformError: MLX does not run here.
            NotSupportedError: The server's packages are not installed.
            ModelNotFoundError: The model does not exist.
            ModelUnsupportedError: The model's files are damaged or incomplete.
            InvalidRequestError: An option is out of range for the model, or ``blas`` names no file.
            ValueError: ``listen`` is neither ``"tcp"`` nor ``"unix"``.
            InsufficientMemoryError: The model does not fit into memory.
            RunnerTimeoutError: The child did not become ready in time (phase ``"start"``).
            RunnerExitedError: The child exited.
            RunnerUnavailableError: The runner was closed meanwhile, or is already started.
        """
        async with self._new_life() as life:
            return await self._load(life)

    @contextlib.asynccontextmanager
    async def _new_life(self) -> AsyncIterator[ChildLife[Connection]]:
        """Begin a life, and close the same life if the block raises."""
        life = self._begin_life()
        try:
            yield life
        except BaseException:
            await self._close(life)
            raise

    async def _load(self, life: ChildLife[Connection]) -> MemoryEstimate:
        plan, supervisor = await self._serve(life)
        return self._begin_load(life, plan, supervisor)

    async def _serve(self, life: ChildLife[Connection]) -> tuple[Plan, Supervisor]:
        """Start the child, and return once it serves."""
        begin = time.monotonic()
        plan, child, ready = await start_blocking(life)
        client = AsyncRunnerClient(
            ready.target, token=plan.token, timeouts=self.timeouts, peer=child
        )
        supervisor = Supervisor(child, client)
        await supervisor.wait_until_serving(begin + start_limit(self.timeouts))
        return plan, supervisor

    def _begin_load(
        self, life: ChildLife[Connection], plan: Plan, supervisor: Supervisor
    ) -> MemoryEstimate:
        with life.kept_open():
            load = supervisor.client.start_load(plan.model, options=plan.options)
            life.connection = Connection(supervisor, load)
        supervisor.start_watchdog()
        return plan.estimate

    async def wait_until_running(
        self, on_progress: Callable[[Status], None] | None = None
    ) -> LoadResult:
        """Wait for the load started by ``load``.

        Args:
            on_progress: Called with a status about every 0.2 s.

        Raises:
            RunnerExitedError: The child exited; raised at once.
            RunnerTimeoutError: The load made no progress for ``Timeouts.load_seconds``. The load
                keeps running: wait again, or close.
            RunnerError: The load failed for another reason.
        """
        return await self._wait(self._life, on_progress)

    async def _wait(
        self, life: ChildLife[Connection], on_progress: Callable[[Status], None] | None = None
    ) -> LoadResult:
        connection = life.require_connection()
        result = await connection.load.wait(on_progress)
        life.note_loaded(await connection.client.status())
        return result

    async def status(self) -> Status:
        """Return the runner's current status, and update the properties of this object.

        Raises:
            RunnerError: The call failed.
        """
        life = self._life
        status = life.status = await life.require_connection().client.status()
        return status

    async def ping(self) -> float:
        """Request a status and return the round-trip time, in seconds.

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
        priority: int = 0,
        bypass_prefix_cache: bool = False,
        cache_salt: str = "",
        literal: bool = False,
        logprob_token_ids: Sequence[int] = (),
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
        adapter: str = "",
    ) -> AsyncCompletionStream:
        """Start a completion; see ``AsyncRunnerClient.completion``.

        Raises:
            InvalidRequestError: An argument cannot be sent.
            RunnerUnavailableError: The runner was not started, or has exited.
        """
        return self.client.completion(
            prompt,
            options=options,
            logprobs=logprobs,
            request_id=request_id,
            priority=priority,
            bypass_prefix_cache=bypass_prefix_cache,
            cache_salt=cache_salt,
            literal=literal,
            logprob_token_ids=logprob_token_ids,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint,
            adapter=adapter,
        )

    async def complete(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
        priority: int = 0,
        bypass_prefix_cache: bool = False,
        cache_salt: str = "",
        literal: bool = False,
        logprob_token_ids: Sequence[int] = (),
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
        adapter: str = "",
    ) -> Completion:
        """Run a completion to the end; see ``AsyncRunnerClient.complete``.

        Raises:
            RunnerError: The completion failed; the class gives the reason.
        """
        return await self.client.complete(
            prompt,
            options=options,
            logprobs=logprobs,
            request_id=request_id,
            priority=priority,
            bypass_prefix_cache=bypass_prefix_cache,
            cache_salt=cache_salt,
            literal=literal,
            logprob_token_ids=logprob_token_ids,
            prompt_logprobs=prompt_logprobs,
            constraint=constraint,
            adapter=adapter,
        )

    def chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Tool] = (),
        tool_choice: Literal["auto", "none", "required"] = "auto",
        chat_template_kwargs: Mapping[str, object] | None = None,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
        priority: int = 0,
        bypass_prefix_cache: bool = False,
        cache_salt: str = "",
        literal: bool = False,
        logprob_token_ids: Sequence[int] = (),
        constraint: Constraint | None = None,
        adapter: str = "",
        tool_name: str = "",
        reasoning_budget: int | None = None,
    ) -> AsyncChatStream:
        """Start an answer to a conversation; see ``AsyncRunnerClient.chat``.

        Raises:
            InvalidRequestError: An argument cannot be sent.
            RunnerUnavailableError: The runner was not started, or has exited.
        """
        return self.client.chat(
            messages,
            tools=tools,
            tool_choice=tool_choice,
            chat_template_kwargs=chat_template_kwargs,
            options=options,
            logprobs=logprobs,
            request_id=request_id,
            priority=priority,
            bypass_prefix_cache=bypass_prefix_cache,
            cache_salt=cache_salt,
            literal=literal,
            logprob_token_ids=logprob_token_ids,
            constraint=constraint,
            adapter=adapter,
            tool_name=tool_name,
            reasoning_budget=reasoning_budget,
        )

    async def tokenize(
        self, content: str, *, add_special_tokens: bool = False, literal: bool = False
    ) -> list[int]:
        """Split text into token ids; see ``AsyncRunnerClient.tokenize``.

        Raises:
            RunnerError: The call failed.
        """
        return await self.client.tokenize(
            content, add_special_tokens=add_special_tokens, literal=literal
        )

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Join token ids into text; see ``AsyncRunnerClient.detokenize``.

        Raises:
            RunnerError: The call failed.
        """
        return await self.client.detokenize(token_ids)

    async def trim(self, *, prefix_cache_bytes: int | None = None) -> int:
        """Free memory and return the bytes freed; see ``AsyncRunnerClient.trim``.

        Raises:
            RunnerError: The call failed.
        """
        return await self.client.trim(prefix_cache_bytes=prefix_cache_bytes)

    async def embedding(self, content: str) -> Embedding:
        """Return the vector of a text; see ``AsyncRunnerClient.embedding``.

        Raises:
            NotSupportedError: The model is not made for embeddings.
            RunnerError: The call failed for another reason.
        """
        return await self.client.embedding(content)

    async def restart(self, on_progress: Callable[[Status], None] | None = None) -> LoadResult:
        """Stop the child if still running, start another, and wait until the model is loaded.

        Raises:
            RunnerUnavailableError: The restart policy allows no more restarts.
            RunnerError: ``load`` or ``wait_until_running`` failed.
        """
        self._count_restart()
        await self.close()
        await self.load()
        return await self.wait_until_running(on_progress)

    async def close(self) -> None:
        """Ask the child to stop, or kill it after the grace time, and wait for the exit.

        The grace time is ``Timeouts.close_seconds`` plus one second per 4 GiB of memory held.
        May be called at any time and repeatedly; ``load`` may follow. Cancelling this task kills
        the child at once and still reaps it.
        """
        await self._close(self._life)

    async def _close(self, life: ChildLife[Connection]) -> None:
        try:
            await close_blocking(life)
        finally:
            if life.connection is not None:
                await life.connection.end()

    async def __aenter__(self) -> Self:
        async with self._new_life() as life:
            await self._load(life)
            await self._wait(life)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
