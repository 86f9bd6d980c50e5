"""The sync client of any runner, local or remote."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NoReturn, Self, TypeVar

import grpc
from google.protobuf.wrappers_pb2 import Int32Value, StringValue

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from runner_client.errors import RunnerError
from runner_client.rpc import health, messages
from runner_client.rpc.base import (
    LOAD_SECONDS,
    POLL_SECONDS,
    STATUS_SECONDS,
    ClientBase,
    embedding_error,
)
from runner_client.rpc.channel import open_channel
from runner_client.rpc.stream import CompletionStream
from runner_client.rpc.trace import with_trace
from runner_client.rpc.waits import LoadWatch
from runner_client.rpc.watchdog import Watchdog

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from runner_client.types import (
        Completion,
        Dtype,
        LoadEstimate,
        LoadResult,
        Options,
        Status,
        Timeouts,
        TlsFiles,
    )

    LoadCall = grpc.Future[pb.LoadResponse]

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class RunnerClient(ClientBase):
    """Calls a runner at an address.

    Threads may share a client: every method may be called from any of them, at
    the same time, and ``close()`` ends the calls of the others. It knows nothing
    of event loops; in asyncio use ``AsyncRunnerClient``. It does not survive a
    fork: gRPC does not. Make a client after the fork, or spawn instead.

    Nothing is dialled before the first call. Calls that only read are retried a
    little when the runner cannot be reached; no other call ever is.

    Args:
        address: ``HOST:PORT`` or ``unix:/path``.
        token: What the server asks of its callers, sent with every call. Without TLS
            it goes over the wire in clear.
        tls: Encrypts, and says whom to trust. Default: the connection is not encrypted.
        timeouts: How long to wait for what.

    Raises:
        ValueError: The address is empty, or the token cannot be sent.
        OSError: A file of ``tls`` cannot be read.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        tls: TlsFiles | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        super().__init__(address, timeouts, token, tls)
        self._channel = open_channel(address, self._access.credentials)
        self._stub = runner_pb2_grpc.RunnerServiceStub(self._channel)
        self._health = self._channel.unary_unary(
            health.METHOD, StringValue.SerializeToString, Int32Value.FromString
        )
        self._watchdog = Watchdog()

    def load(
        self,
        model: str,
        *,
        context_length: int | None = None,
        parallel: int | None = None,
        dtype: Dtype = "auto",
        memory_limit_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        memory_override: bool = False,
        allow_inexact: bool = False,
        on_progress: Callable[[Status], None] | None = None,
    ) -> LoadResult:
        """Loads a model and returns when it can be used.

        A load that does not move for ``Timeouts.load_seconds`` is cancelled, and so
        is one that this method leaves early (an interrupt, an error of the callback).

        Args:
            model: A directory on the server's machine, or a hub id in its local cache.
            context_length: The longest sequence, in tokens. Default: the model's own
                limit, at most 4,096.
            parallel: How many completions are decoded together. Default: 4.
            dtype: In which format to hold the weights.
            memory_limit_bytes: The most that MLX may hold for the model. Default: what
                ``estimate`` counts.
            prefix_cache_bytes: Of it, the most to keep evaluated prompts in, for others
                that begin alike; 0 keeps none. Default: one sequence, or a quarter of
                all of them; less where memory is short.
            memory_override: Load it even if it does not fit by the runner's estimate.
                The system may then end the process when its memory fills up.
            allow_inexact: Load it even if it cannot be computed exactly as its files
                say; ``Model.warnings`` names the differences.
            on_progress: Called with a status about every 0.2 s.

        Raises:
            ModelNotFoundError: There is no such model.
            ModelUnsupportedError: It cannot be loaded.
            InsufficientMemoryError: It does not fit.
            BusyError: Another load or an unload runs.
            RunnerTimeoutError: Nothing moved for too long (phase ``"load"``).
            RunnerError: The call failed in another way.
        """
        request = messages.load_request(
            model,
            context_length=context_length,
            parallel=parallel,
            dtype=dtype,
            memory_limit_bytes=memory_limit_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            memory_override=memory_override,
            allow_inexact=allow_inexact,
        )
        call = self._start_load(request)
        try:
            return self._finish_load(call, on_progress)
        finally:
            call.cancel()

    def _start_load(self, request: pb.LoadRequest) -> LoadCall:
        try:
            return self._stub.Load.future(
                request, timeout=LOAD_SECONDS, metadata=with_trace(self._access.metadata)
            )
        except ValueError as error:
            raise self._failure(error) from error

    def _finish_load(
        self, call: LoadCall, on_progress: Callable[[Status], None] | None
    ) -> LoadResult:
        watch = LoadWatch(self.timeouts.load_seconds, time.monotonic())
        while True:
            try:
                return messages.load_result(call.result(timeout=POLL_SECONDS))
            except grpc.FutureTimeoutError:
                self._watch_load(watch, on_progress)
            except (grpc.RpcError, grpc.FutureCancelledError, ValueError) as error:
                raise self._failure(error) from error

    def _watch_load(self, watch: LoadWatch, on_progress: Callable[[Status], None] | None) -> None:
        try:
            status = self._status(STATUS_SECONDS)
        except RunnerError:
            # The load itself says what is wrong, unless nothing answers at all.
            status = None
        watch.observe(status, time.monotonic())
        if status is not None and on_progress is not None:
            on_progress(status)

    def estimate(
        self,
        model: str,
        *,
        context_length: int | None = None,
        parallel: int | None = None,
        dtype: Dtype = "auto",
        memory_limit_bytes: int | None = None,
        prefix_cache_bytes: int | None = None,
        allow_inexact: bool = False,
    ) -> LoadEstimate:
        """Ask what a load would need in memory, and whether it fits now.

        Nothing is loaded, and a loaded model keeps working. The first call for a model
        takes about half a second; ``Timeouts.call_seconds`` is its limit too.

        Args:
            model: A directory on the server's machine, or a hub id in its local cache.
            context_length: The longest sequence, in tokens. Default: the model's own
                limit, at most 4,096.
            parallel: How many completions are decoded together. Default: 4.
            dtype: In which format to hold the weights.
            memory_limit_bytes: The most that MLX may hold. Default: no limit.
            prefix_cache_bytes: The most to keep evaluated prompts in. Default: as in
                ``load``.
            allow_inexact: As in ``load``; ``notes`` names the differences.

        Raises:
            InvalidRequestError: A field is out of range.
            ModelNotFoundError: There is no such model.
            ModelUnsupportedError: It cannot be loaded.
            InsufficientMemoryError: One sequence does not fit ``memory_limit_bytes``.
                What does not fit the machine is no error.
            RunnerError: The call failed in another way.
        """
        request = messages.estimate_request(
            model,
            context_length=context_length,
            parallel=parallel,
            dtype=dtype,
            memory_limit_bytes=memory_limit_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            allow_inexact=allow_inexact,
        )
        return messages.load_estimate(self._call(self._stub.Estimate, request))

    def trim(self, *, prefix_cache_bytes: int | None = None) -> int:
        """Have the runner give memory back without ending anything; return the bytes.

        Entries of the prefix cache go first, then what MLX and the heap keep of freed
        memory. Running completions wait for it, a fraction of a second, and it waits for
        the step that they are in; ``Timeouts.call_seconds`` is its limit.

        Args:
            prefix_cache_bytes: The size that the prefix cache is reduced to at least; it
                may grow again afterwards. Default: 0.

        Raises:
            InvalidRequestError: The size is negative.
            BusyError: A load or an unload runs.
            RunnerError: The call failed in another way.
        """
        request = messages.trim_request(prefix_cache_bytes)
        return self._call(self._stub.Trim, request).freed_bytes

    def unload(self) -> int:
        """Ends all completions, frees the model, and returns how many bytes came back.

        Raises:
            BusyError: A load or another unload runs.
            RunnerError: The call failed in another way.
        """
        return self._call(self._stub.Unload, pb.UnloadRequest()).freed_bytes

    def status(self) -> Status:
        """Asks what the runner does and holds. It answers during a load too.

        Raises:
            RunnerError: The call failed.
        """
        return self._status(self.timeouts.call_seconds)

    def _status(self, timeout_seconds: float) -> Status:
        return messages.status(self._call(self._stub.Status, pb.StatusRequest(), timeout_seconds))

    def ping(self) -> float:
        """Asks for a status and returns how long the answer took, in seconds.

        Raises:
            RunnerError: The call failed.
        """
        begin = time.monotonic()
        self.status()
        return time.monotonic() - begin

    def is_serving(self, service: str = "") -> bool:
        """Asks ``grpc.health.v1`` whether calls are answered (not: a model is loaded).

        Args:
            service: A full service name; "" is the server as a whole.

        Raises:
            RunnerError: The call failed, or the service is unknown.
        """
        return health.is_serving(self._call(self._health, health.request(service)))

    def completion(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
    ) -> CompletionStream:
        """Starts a completion and returns the stream of its chunks.

        Reading raises ``RunnerTimeoutError`` after ``Timeouts.first_token_seconds``
        without a token, or ``Timeouts.idle_seconds`` without any message.

        Args:
            prompt: Text, or token ids that are used as they are.
            options: How to choose tokens and when to stop.
            logprobs: With each token, its log probability and those of this many
                most likely ones, 0 to 20. Default: none.
            request_id: A name for the server's log lines.

        Raises:
            RunnerUnavailableError: The client is closed. All other failures come
                from reading the stream.
        """
        request = messages.completion_request(
            prompt, options=options, logprobs=logprobs, request_id=request_id
        )
        try:
            call = self._stub.Completion(request, metadata=with_trace(self._access.metadata))
        except ValueError as error:
            raise self._failure(error) from error
        return CompletionStream(
            call, timeouts=self.timeouts, watchdog=self._watchdog, failure=self._failure
        )

    def complete(
        self,
        prompt: str | Sequence[int],
        *,
        options: Options | None = None,
        logprobs: int | None = None,
        request_id: str = "",
    ) -> Completion:
        """Waits for a whole completion. Arguments and limits are ``completion``'s.

        Raises:
            InvalidRequestError: A field is out of range.
            PromptTooLongError: The prompt does not fit the context.
            ModelNotLoadedError: No model is loaded.
            QueueFullError: Too many requests wait.
            RunnerTimeoutError: No token, or no message, came for too long.
            RunnerError: The completion failed in another way.
        """
        stream = self.completion(prompt, options=options, logprobs=logprobs, request_id=request_id)
        with stream:
            return messages.join_chunks(list(stream))

    def tokenize(self, content: str, *, add_special_tokens: bool = False) -> list[int]:
        """Splits text into the model's token ids.

        Args:
            content: The text.
            add_special_tokens: Whether to add what a completion's prompt gets.

        Raises:
            ModelNotLoadedError: No model is loaded.
            RunnerError: The call failed in another way.
        """
        request = messages.tokenize_request(content, add_special_tokens=add_special_tokens)
        return list(self._call(self._stub.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Joins token ids into text: the inverse of ``tokenize``.

        Raises:
            InvalidRequestError: An id is not in the vocabulary.
            ModelNotLoadedError: No model is loaded.
            RunnerError: The call failed in another way.
        """
        request = messages.detokenize_request(token_ids)
        return self._call(self._stub.Detokenize, request).content

    def embedding(self, content: str) -> NoReturn:  # noqa: ARG002 - the interface has it
        """Always raises: the runner completes text only.

        Raises:
            NotSupportedError: Always.
        """
        raise embedding_error()

    def _call(
        self,
        method: grpc.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout_seconds: float | None = None,
    ) -> _Response:
        timeout = timeout_seconds or self.timeouts.call_seconds
        try:
            return method(request, timeout=timeout, metadata=with_trace(self._access.metadata))
        except (grpc.RpcError, ValueError) as error:
            raise self._failure(error, timeout) from error

    def _failure(self, error: Exception, timeout_seconds: float | None = None) -> RunnerError:
        return self._translated(error, timeout_seconds)

    def close(self) -> None:
        """Closes the connection; pending calls end with ``RunnerUnavailableError``."""
        self._is_closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
