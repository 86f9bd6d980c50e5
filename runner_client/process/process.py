"""Sync runner in a child process."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, NoReturn, Self

from runner_client.errors import RunnerError, RunnerExitedError
from runner_client.process.base import (
    HEALTH_SECONDS,
    ProcessBase,
    not_serving,
    not_started,
    start_limit,
)
from runner_client.process.stall import StallDetector
from runner_client.rpc.base import STATUS_SECONDS, embedding_error
from runner_client.rpc.client import RunnerClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import TracebackType

    from mlxrunner.v1 import runner_pb2 as pb
    from runner_client.memory.estimation import MemoryEstimate
    from runner_client.process.child import Child
    from runner_client.rpc.calls import LoadCall
    from runner_client.rpc.stream import CompletionStream
    from runner_client.types import Completion, LoadResult, Options, Status, Timeouts


class _ChildClient(RunnerClient):
    """Client of a child, aware of the child's exit."""

    def __init__(self, address: str, token: str, child: Child, timeouts: Timeouts) -> None:
        super().__init__(address, token=token, timeouts=timeouts)
        self._child = child
        # The system closes a dead child's connections, except for those that another process holds
        # open. Closing the client ends the calls on these too.
        child.on_exit(self.close)

    def wait_until_serving(self, deadline: float) -> None:
        """Poll the health service until the child reports SERVING."""
        while not self._is_healthy():
            if self._child.wait_exit(HEALTH_SECONDS):
                raise self._child.gone_error()
            if time.monotonic() > deadline:
                raise not_serving(self.address, self.timeouts)

    def _is_healthy(self) -> bool:
        try:
            return self.is_serving()
        except RunnerExitedError:
            raise
        except RunnerError:
            return False

    def start_watchdog(self) -> None:
        """Kill the child if the engine stalls for ``Timeouts.stall_seconds``, unless None."""
        if self.timeouts.stall_seconds is not None:
            watch = StallDetector(self.timeouts.stall_seconds)
            threading.Thread(
                target=self._watch_engine, args=(watch,), name="runner-stall", daemon=True
            ).start()

    def _watch_engine(self, watch: StallDetector) -> None:
        while not self._child.wait_exit(watch.look_seconds):
            with contextlib.suppress(RunnerError):
                if stall := watch.observe(self._status(STATUS_SECONDS)):
                    self._child.kill(stall)

    def start_load(self, request: pb.LoadRequest) -> LoadCall:
        """Start a load."""
        return self._start_load(request)

    def finish_load(
        self, call: LoadCall, on_progress: Callable[[Status], None] | None
    ) -> LoadResult:
        """Wait for a load started by ``start_load``."""
        return self._finish_load(call, on_progress)

    def _status(self, timeout_seconds: float) -> Status:
        status = super()._status(timeout_seconds)
        self._child.note_memory(status.memory_usage.process_bytes)
        return status

    @property
    def is_gone(self) -> bool:
        """True once the child has exited."""
        return self._child.has_exited

    def _failure(self, error: BaseException, timeout_seconds: float | None = None) -> RunnerError:
        return self._child.explain(super()._failure(error, timeout_seconds))


class RunnerProcess(ProcessBase):
    """A runner in a child process: check memory, then spawn, load, call and stop.

    As a context manager, it loads the model on entry and stops the child on exit::

        with RunnerProcess("org/model") as runner:
            for chunk in runner.completion("Once upon a time"):
                print(chunk.content, end="")

    Without the context manager, call ``load()``, which checks memory and spawns the child, then
    ``wait_until_running()``, and always ``close()`` in the end. The child requires a new random
    token, so additional clients need it: ``RunnerClient(runner.address, token=runner.token)``.

    Thread-safe: threads may share a runner, and ``close()`` may be called from any thread at any
    time. Calls that are pending then raise ``RunnerUnavailableError``; if the child dies, they
    raise ``RunnerExitedError``. The thread that started the child may exit.

    If this process dies in any way, the child exits within 2 s; a fork that outlives this process
    delays that by half a second. A runner does not survive a fork, because gRPC does not: a
    forked copy of this process must not use it.

    Args:
        model: A directory, or a hub id in the local Hugging Face cache.
        context_length: The longest sequence, in tokens. Default: the model's own limit, at most
            4,096.
        parallel: The maximum number of completions decoded together. Default: 4.
        dtype: The number format of the weights in memory. ``"auto"`` is float32 on a CPU and
            refuses a model that does not fit; ``"auto_or_stored"`` then keeps the weights as
            stored, many times slower, and sets ``Model.dtype_fallback``.
        prefix_cache_bytes: The upper limit of the prefix cache, part of the memory that the gate
            checks; 0 disables the cache. Default: the KV cache of one sequence, or a quarter of
            that of all sequences if larger; less if memory is short, so the gate does not insist.
        require_full: Raise ``LoadRequiresFullError`` instead of ``InsufficientMemoryError`` if the
            model does not fit, and never fall back to the stored format.
        memory_override: Start and load the model even if it does not fit, as stored if ``dtype``
            is ``"auto_or_stored"``.
        allow_inexact: Load the model even if it cannot be computed exactly as its files specify;
            ``Model.warnings`` lists the differences.
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
    """

    _running: tuple[_ChildClient, LoadCall] | None = None

    def load(self) -> MemoryEstimate:
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
            InsufficientMemoryError: The model does not fit into memory.
            RunnerTimeoutError: The child did not become ready in time (phase ``"start"``).
            RunnerExitedError: The child exited.
            RunnerUnavailableError: The runner was closed meanwhile, or was started before.
        """
        with self._new_life() as life:
            return self._load(life)

    @contextlib.contextmanager
    def _new_life(self) -> Iterator[int]:
        """Begin a life, and end the same life if the block raises."""
        life = self._begin_life()
        try:
            yield life
        except BaseException:
            self._close(life)
            raise

    def _load(self, life: int) -> MemoryEstimate:
        begin = time.monotonic()
        plan, child, ready = self._start_child(life)
        client = _ChildClient(ready.target, plan.token, child, self.timeouts)
        client.wait_until_serving(begin + start_limit(self.timeouts))
        with self._in_life(life):
            self._running = client, client.start_load(plan.load_request())
        client.start_watchdog()
        return plan.estimate

    def wait_until_running(self, on_progress: Callable[[Status], None] | None = None) -> LoadResult:
        """Wait for the load started by ``load``.

        Args:
            on_progress: Called with a status about every 0.2 s.

        Raises:
            RunnerExitedError: The child exited; raised at once.
            RunnerTimeoutError: The load made no progress for ``Timeouts.load_seconds``. The load
                keeps running: wait again, or close.
            RunnerError: The load failed for another reason.
        """
        client, call = self._require_running()
        result = client.finish_load(call, on_progress)
        self._note_loaded(client.status())
        return result

    def status(self) -> Status:
        """Return the runner's current status, and update the properties of this object.

        Raises:
            RunnerError: The call failed.
        """
        status = self._status = self._client.status()
        return status

    def ping(self) -> float:
        """Request a status and return the round-trip time, in seconds. Raises like ``status``."""
        begin = time.monotonic()
        self.status()
        return time.monotonic() - begin

    def completion(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
    ) -> CompletionStream:
        """Start a completion; see ``RunnerClient.completion``.

        Raises:
            InvalidRequestError: An argument cannot be sent.
            RunnerUnavailableError: The runner was not started, or has exited.
        """
        return self._client.completion(
            prompt, options=options, logprobs=logprobs, request_id=request_id
        )

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
    ) -> Completion:
        """Run a completion to the end; see ``RunnerClient.complete``.

        Raises:
            RunnerError: The completion failed; the class gives the reason.
        """
        return self._client.complete(
            prompt, options=options, logprobs=logprobs, request_id=request_id
        )

    def tokenize(self, content: str, *, add_special_tokens: bool = False) -> list[int]:
        """Split text into token ids; see ``RunnerClient.tokenize``.

        Raises:
            RunnerError: The call failed.
        """
        return self._client.tokenize(content, add_special_tokens=add_special_tokens)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Join token ids into text; see ``RunnerClient.detokenize``.

        Raises:
            RunnerError: The call failed.
        """
        return self._client.detokenize(token_ids)

    def trim(self, *, prefix_cache_bytes: int | None = None) -> int:
        """Free memory and return the bytes freed; see ``RunnerClient.trim``.

        Raises:
            RunnerError: The call failed.
        """
        return self._client.trim(prefix_cache_bytes=prefix_cache_bytes)

    def embedding(self, content: str) -> NoReturn:  # noqa: ARG002 - the interface has it
        """Raise ``NotSupportedError``: the runner only completes text."""
        raise embedding_error()

    def restart(self, on_progress: Callable[[Status], None] | None = None) -> LoadResult:
        """Stop the child if still running, start another, and wait until the model is loaded.

        Raises:
            RunnerUnavailableError: The restart policy allows no more restarts.
            RunnerError: ``load`` or ``wait_until_running`` failed.
        """
        self._count_restart()
        self.close()
        self.load()
        return self.wait_until_running(on_progress)

    def close(self) -> None:
        """Ask the child to stop, or kill it after the grace time, and wait for the exit.

        The grace time is ``Timeouts.close_seconds`` plus one second per 4 GiB of memory held.
        May be called at any time, from any thread, and repeatedly; ``load`` may follow. An
        interrupt during the wait kills the child at once.
        """
        self._close()

    def _close(self, life: int | None = None) -> None:
        ending = self._begin_close(life)
        if ending is None:
            return
        try:
            self._close_child(ending)
        finally:
            # The client may belong to a newer child, which is running.
            running = self._running
            if running is not None and running[0].is_gone:
                running[0].close()

    @property
    def _client(self) -> _ChildClient:
        return self._require_running()[0]

    def _require_running(self) -> tuple[_ChildClient, LoadCall]:
        if self._running is None:
            raise not_started()
        return self._running

    def __enter__(self) -> Self:
        with self._new_life() as life:
            self._load(life)
            self.wait_until_running()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
