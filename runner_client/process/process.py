"""A runner in a child process of one's own, sync."""

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
    from runner_client.rpc.client import LoadCall
    from runner_client.rpc.stream import CompletionStream
    from runner_client.types import Completion, LoadResult, Options, Status, Timeouts


class _ChildClient(RunnerClient):
    """A client that knows when its runner is dead."""

    def __init__(self, address: str, token: str, child: Child, timeouts: Timeouts) -> None:
        super().__init__(address, token=token, timeouts=timeouts)
        self._child = child
        # A dead child's connections are closed by the system; this ends those too
        # that another process holds open.
        child.on_exit(self.close)

    def wait_until_serving(self, deadline: float) -> None:
        """Asks for the health until it is good."""
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
        """Kills the child when its engine stands still, if ``Timeouts`` say so."""
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
        """Begins a load."""
        return self._start_load(request)

    def finish_load(
        self, call: LoadCall, on_progress: Callable[[Status], None] | None
    ) -> LoadResult:
        """Waits for a load that ``start_load`` began."""
        return self._finish_load(call, on_progress)

    def _status(self, timeout_seconds: float) -> Status:
        status = super()._status(timeout_seconds)
        self._child.note_memory(status.memory_usage.process_bytes)
        return status

    @property
    def is_gone(self) -> bool:
        """Whether the child has exited."""
        return self._child.has_exited

    def _failure(self, error: Exception, timeout_seconds: float | None = None) -> RunnerError:
        return self._child.explain(super()._failure(error, timeout_seconds))


class RunnerProcess(ProcessBase):
    """Gates, spawns, loads, calls and stops a runner of one's own.

    As a context manager it is ready inside and gone outside::

        with RunnerProcess("org/model") as runner:
            for chunk in runner.completion("Once upon a time"):
                print(chunk.content, end="")

    Step by step it is ``load()``, which decides and starts, then
    ``wait_until_running()``, and ``close()`` in the end, in every case. The child asks
    its callers for a token that is new each time: ``RunnerClient(runner.address,
    token=runner.token)`` is one more of them.

    Threads may share it, and ``close()`` may be called from any of them in any
    phase; calls that run then end with ``RunnerUnavailableError``. When the child
    dies they end with ``RunnerExitedError``. The thread that starts it may end. It
    does not survive a fork: gRPC does not, and a forked copy of this process must
    not touch it. If this process dies, however it dies, the child is gone within
    2 s; a fork that outlives it delays that by half a second.

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

    _running: tuple[_ChildClient, LoadCall] | None = None

    def load(self) -> MemoryEstimate:
        """Decides whether the model fits, spawns the child and begins the load.

        Returns as soon as the child answers calls and has begun to load;
        ``wait_until_running`` waits for the rest. Leaves nothing behind if it raises.

        Returns:
            What the gate counted.

        Raises:
            UnsupportedPlatformError: MLX does not run here.
            NotSupportedError: The server's packages are not installed.
            ModelNotFoundError: There is no such model.
            ModelUnsupportedError: Its files are damaged or incomplete.
            InsufficientMemoryError: It does not fit.
            RunnerTimeoutError: The child did not get ready (phase ``"start"``).
            RunnerExitedError: The child ended.
            RunnerUnavailableError: It was closed meanwhile, or started before.
        """
        with self._new_life() as life:
            return self._load(life)

    @contextlib.contextmanager
    def _new_life(self) -> Iterator[int]:
        """Begins a life, and ends it, if it is not over, if the block raises."""
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
        """Waits until the load that ``load`` began is done.

        Args:
            on_progress: Called with a status about every 0.2 s.

        Raises:
            RunnerExitedError: The child ended; raised at once.
            RunnerTimeoutError: Nothing moved for ``Timeouts.load_seconds``. The load
                goes on: wait again, or close.
            RunnerError: The load failed in another way.
        """
        client, call = self._require_running()
        result = client.finish_load(call, on_progress)
        self._note_loaded(client.status())
        return result

    def status(self) -> Status:
        """Asks what the runner does and holds; properties show it afterwards.

        Raises:
            RunnerError: The call failed.
        """
        status = self._status = self._client.status()
        return status

    def ping(self) -> float:
        """Asks for a status; returns how long the answer took, in seconds.

        Raises:
            RunnerError: The call failed.
        """
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
        """Starts a completion: see ``RunnerClient.completion``.

        Raises:
            RunnerUnavailableError: The runner was not started, or is gone.
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
        """Waits for a whole completion: see ``RunnerClient.complete``.

        Raises:
            RunnerError: The completion failed; the class says how.
        """
        return self._client.complete(
            prompt, options=options, logprobs=logprobs, request_id=request_id
        )

    def tokenize(self, content: str, *, add_special_tokens: bool = False) -> list[int]:
        """Splits text into token ids: see ``RunnerClient.tokenize``.

        Raises:
            RunnerError: The call failed.
        """
        return self._client.tokenize(content, add_special_tokens=add_special_tokens)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Joins token ids into text: see ``RunnerClient.detokenize``.

        Raises:
            RunnerError: The call failed.
        """
        return self._client.detokenize(token_ids)

    def trim(self, *, prefix_cache_bytes: int | None = None) -> int:
        """Have the runner give memory back; return the bytes: see ``RunnerClient.trim``.

        Raises:
            RunnerError: The call failed.
        """
        return self._client.trim(prefix_cache_bytes=prefix_cache_bytes)

    def embedding(self, content: str) -> NoReturn:  # noqa: ARG002 - the interface has it
        """Always raises: the runner completes text only.

        Raises:
            NotSupportedError: Always.
        """
        raise embedding_error()

    def restart(self, on_progress: Callable[[Status], None] | None = None) -> LoadResult:
        """Ends the child if it still runs, starts another, and waits until it runs.

        Raises:
            RunnerUnavailableError: The restart policy allows no more.
            RunnerError: What ``load`` and ``wait_until_running`` raise.
        """
        self._count_restart()
        self.close()
        self.load()
        return self.wait_until_running(on_progress)

    def close(self) -> None:
        """Asks the child to stop, kills it after the grace time, and reaps it.

        The grace time is ``Timeouts.close_seconds`` and a second more per 4 GiB
        held. May be called in any phase, from any thread, and again; ``load`` may
        follow. An interrupt while it waits kills at once.
        """
        self._close()

    def _close(self, life: int | None = None) -> None:
        ending = self._begin_close(life)
        if ending is None:
            return
        try:
            self._close_child(ending)
        finally:
            # It may be that of a newer child, which runs.
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
