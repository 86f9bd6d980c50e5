"""Exceptions of this library: every failed call raises a ``RunnerError``.

::

    RunnerError
    ├── InvalidRequestError              INVALID_FIELD      correct the request
    │   └── PromptTooLongError           PROMPT_TOO_LONG    shorten it, or load more context
    ├── ModelError                                          (groups the next three)
    │   ├── ModelNotFoundError           MODEL_NOT_FOUND    correct the path or hub id
    │   ├── ModelUnsupportedError        MODEL_UNSUPPORTED  use another model
    │   └── ModelNotLoadedError          MODEL_NOT_LOADED   load first
    ├── AuthenticationError              UNAUTHENTICATED    send the runner's token
    ├── PermissionDeniedError            PERMISSION_DENIED  send the token with all rights
    ├── BusyError                        BUSY               wait for the other load; retry
    ├── InsufficientMemoryError          INSUFFICIENT_MEMORY  free memory, or ask for less
    │   └── LoadRequiresFullError        (the gate, ``require_full``)  use another device
    ├── QueueFullError                   QUEUE_FULL         retry after retry_delay_seconds
    ├── ShuttingDownError                SHUTTING_DOWN      use another runner, or load again
    ├── GenerationFailedError            GENERATION_FAILED  retrying is safe
    ├── RequestAbortedError              ABORTED            do not retry it automatically
    ├── RunnerTimeoutError               DEADLINE_EXCEEDED  ``phase`` names the timeout
    ├── RunnerUnavailableError           UNAVAILABLE        the runner cannot be reached
    │   └── RunnerExitedError            (child process)    restart the runner
    ├── IncompleteStreamError            (client)           the text is incomplete; retrying is safe
    └── NotSupportedError                UNIMPLEMENTED      retrying never helps
        └── UnsupportedPlatformError     (client)           use another machine

The middle column holds the ``reason`` of the server's ``google.rpc.ErrorInfo``. If the
server gives no reason, it holds the gRPC status code, or in parentheses the part of this
library that raises the exception. A reason unknown to this version maps to the class of
its gRPC code, and a code without a class maps to ``RunnerError``.

``grpc.RpcError`` never escapes this library; it is the ``__cause__`` of the exception
raised for a failed call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import grpc

TimeoutPhase = Literal["call", "start", "load", "first_token", "idle"]
"""The timeout that expired; see ``RunnerTimeoutError.phase``."""


class RunnerError(Exception):
    """Base class of every failure of a call or a runner.

    Attributes:
        reason: The server's reason, for instance ``"QUEUE_FULL"``; None if the server
            gave none or the client itself detected the failure.
        code: The gRPC status code; None if no call failed.
        metadata: Details from the server as strings, with units in the key
            (``requiredBytes``).
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.code = code
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidRequestError(RunnerError):
    """A field of the request is missing or out of range. Correct the request; do not retry.

    Attributes:
        field_violations: Pairs of a field's path and a description of the problem.
    """

    def __init__(
        self,
        message: str,
        *,
        field_violations: Sequence[tuple[str, str]] = (),
        reason: str | None = None,
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, code=code, metadata=metadata)
        self.field_violations: tuple[tuple[str, str], ...] = tuple(field_violations)


class PromptTooLongError(InvalidRequestError):
    """The prompt plus one new token exceeds the context. Shorten the prompt, or load more context.

    Attributes:
        prompt_tokens: The length of the prompt, in tokens; None if unknown.
        context_length: The runner's limit, in tokens; None if unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        prompt_tokens: int | None = None,
        context_length: int | None = None,
        field_violations: Sequence[tuple[str, str]] = (),
        reason: str | None = None,
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            message,
            field_violations=field_violations,
            reason=reason,
            code=code,
            metadata=metadata,
        )
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class ModelError(RunnerError):
    """Base class of errors about a missing, unsupported or unloaded model.

    Attributes:
        model: The model as requested; None if the call named none.
    """

    def __init__(
        self,
        message: str,
        *,
        model: str | None = None,
        reason: str | None = None,
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, code=code, metadata=metadata)
        self.model = model


class ModelNotFoundError(ModelError):
    """The model is neither a directory nor a hub id in the local cache."""


class ModelUnsupportedError(ModelError):
    """The runner cannot load the model's files, or the model needs custom code."""


class ModelNotLoadedError(ModelError):
    """No model is loaded, but the call needs one. Load a model, then retry."""


class AuthenticationError(RunnerError):
    """The call has a missing or wrong token.

    Pass the runner's token to the client. For a child process it is ``RunnerProcess.token``.
    """


class PermissionDeniedError(RunnerError):
    """The call's token may use the loaded model, but not control the runner.

    Pass the runner's token with all rights to the client.
    """


class BusyError(RunnerError):
    """Another load or unload is running. Wait and retry, or cancel the other call."""


class InsufficientMemoryError(RunnerError):
    """The model does not fit into the available memory. Free memory, or ask for less.

    Raised by the server for a load, and by the memory gate before a process starts.

    Attributes:
        required_bytes: Memory that the model needs.
        available_bytes: Memory that the model may use, after the gate's overhead.
        overhead_bytes: Memory that the gate kept free; None if the server refused.
    """

    def __init__(
        self,
        message: str,
        *,
        required_bytes: int | None = None,
        available_bytes: int | None = None,
        overhead_bytes: int | None = None,
        reason: str | None = None,
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, code=code, metadata=metadata)
        self.required_bytes = required_bytes
        self.available_bytes = available_bytes
        self.overhead_bytes = overhead_bytes


class LoadRequiresFullError(InsufficientMemoryError):
    """The model does not fit the device as a whole, and ``require_full`` was set."""


class QueueFullError(RunnerError):
    """The request queue is full. Retry after the delay, or use another runner.

    Attributes:
        retry_delay_seconds: Time to wait before a retry; None if the server gave none.
    """

    def __init__(
        self,
        message: str,
        *,
        retry_delay_seconds: float | None = None,
        reason: str | None = None,
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, code=code, metadata=metadata)
        self.retry_delay_seconds = retry_delay_seconds


class ShuttingDownError(RunnerError):
    """The runner is stopping or draining, or unloads the model of the call. Use another runner."""


class GenerationFailedError(RunnerError):
    """MLX failed in a step of this request's batch. The runner recovers; retrying is safe."""


class RequestAbortedError(RunnerError):
    """The completion was ended by ``abort`` or ``drain``. Do not retry it automatically.

    The chunks already received are part of the text.
    """


class RunnerTimeoutError(RunnerError):
    """A timeout expired. Retry, raise the timeout, or read the runner's log.

    Attributes:
        phase: The timeout that expired: ``"call"`` (deadline of a unary call), ``"start"``
            (wait for the ready line and a healthy server), ``"load"`` (a load without
            progress), ``"first_token"`` or ``"idle"`` (waits of a stream).
        timeout_seconds: The timeout, in seconds; None if unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        phase: TimeoutPhase = "call",
        timeout_seconds: float | None = None,
        reason: str | None = None,
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, code=code, metadata=metadata)
        self.phase: TimeoutPhase = phase
        self.timeout_seconds = timeout_seconds


class RunnerUnavailableError(RunnerError):
    """The runner cannot be reached, the connection was lost, or the client is closed."""


class RunnerExitedError(RunnerUnavailableError):
    """The child process has exited; raised by every pending call.

    Attributes:
        exit_code: The exit code as ``subprocess`` reports it: a negative value is the
            number of the signal that killed the child. None if the child was never started,
            or if its exit code is unknown because the parent ignores SIGCHLD or other code
            in the parent waited for the child first.
        exit_reason: The exit code in words ("exit code 1", "killed by SIGKILL ...").
        stderr_tail: The last lines that this child wrote to stderr.
        last_memory_bytes: The resident set of the child at its last status; None if no
            status was read.
    """

    def __init__(
        self,
        message: str,
        *,
        exit_code: int | None = None,
        exit_reason: str = "",
        stderr_tail: Sequence[str] = (),
        last_memory_bytes: int | None = None,
        reason: str | None = None,
        code: grpc.StatusCode | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, code=code, metadata=metadata)
        self.exit_code = exit_code
        self.exit_reason = exit_reason
        self.stderr_tail: tuple[str, ...] = tuple(stderr_tail)
        self.last_memory_bytes = last_memory_bytes


class IncompleteStreamError(RunnerError):
    """A completion's stream ended without an error, but before the last message.

    The chunks already received are part of the text. The call had no other effect, so
    retrying is safe.
    """


class NotSupportedError(RunnerError):
    """The runner or this installation does not support the call. Retrying never helps."""


class UnsupportedPlatformError(NotSupportedError):
    """MLX does not run on this operating system or processor."""
