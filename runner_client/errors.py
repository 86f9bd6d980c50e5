"""The exceptions of this library: one tree, and no other exception for a failed call.

::

    RunnerError
    ├── InvalidRequestError              INVALID_FIELD      correct the request
    │   └── PromptTooLongError           PROMPT_TOO_LONG    shorten it, or load more context
    ├── ModelError                                          (groups the next three)
    │   ├── ModelNotFoundError           MODEL_NOT_FOUND    correct the path or hub id
    │   ├── ModelUnsupportedError        MODEL_UNSUPPORTED  use another model
    │   └── ModelNotLoadedError          MODEL_NOT_LOADED   load first
    ├── AuthenticationError              UNAUTHENTICATED    send the runner's token
    ├── BusyError                        BUSY               wait for the other load; retry
    ├── InsufficientMemoryError          INSUFFICIENT_MEMORY  free memory, or ask for less
    │   └── LoadRequiresFullError        (the gate, ``require_full``)  use another device
    ├── QueueFullError                   QUEUE_FULL         retry after retry_delay_seconds
    ├── ShuttingDownError                SHUTTING_DOWN      use another runner, or load again
    ├── GenerationFailedError            GENERATION_FAILED  retrying is safe
    ├── RunnerTimeoutError               DEADLINE_EXCEEDED  phase says which wait it was
    ├── RunnerUnavailableError           UNAVAILABLE        the runner cannot be reached
    │   └── RunnerExitedError            (child process)    start it again, if you like
    ├── IncompleteStreamError            (client)           the text is cut; retrying is safe
    └── NotSupportedError                UNIMPLEMENTED      never works here
        └── UnsupportedPlatformError     (client)           use another machine

The middle column is the ``reason`` of the server's ``google.rpc.ErrorInfo``, or
the gRPC code where the server gives no reason, or who raises it. A reason that
this version does not know becomes the class of its gRPC code, and a code
without a class ``RunnerError`` itself.

``grpc.RpcError`` never escapes this library. It is the ``__cause__`` of an
exception that stands for a failed call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import grpc

TimeoutPhase = Literal["call", "start", "load", "first_token", "idle"]
"""Which wait ran out: see ``RunnerTimeoutError.phase``."""


class RunnerError(Exception):
    """The root of the tree: a call, or a runner, failed.

    Attributes:
        reason: The server's reason, for instance ``"QUEUE_FULL"``; None when the
            server gave none or the client itself found the failure.
        code: The gRPC status code; None when no call failed.
        metadata: The server's numbers and names, as strings, with units in the
            key (``requiredBytes``).
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
    """A field of the request is missing or out of range. Correct it; do not retry.

    Attributes:
        field_violations: Pairs of a field's path and what is wrong with it.
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
    """Prompt and one new token do not fit the context. Shorten it, or load with more.

    Attributes:
        prompt_tokens: The length of the prompt, in tokens.
        context_length: The limit in force, in tokens.
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
    """Something is wrong with the model, or there is none.

    Attributes:
        model: The model as it was asked for; None when the call named none.
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
    """There is no such directory, nor such a hub id in the local cache."""


class ModelUnsupportedError(ModelError):
    """The files are no model this runner can load, or need code of their own to run."""


class ModelNotLoadedError(ModelError):
    """The call needs a loaded model and there is none. Load one, then retry."""


class AuthenticationError(RunnerError):
    """The runner wants a token, and the call had none or another one.

    Give the client its token; ``RunnerProcess.token`` is that of a child.
    """


class BusyError(RunnerError):
    """Another load or unload runs. Wait for it and retry, or cancel it."""


class InsufficientMemoryError(RunnerError):
    """Weights and KV cache do not fit. Free memory, or ask for less.

    The server raises it for a load, and the memory gate before a process starts.

    Attributes:
        required_bytes: What the model needs.
        available_bytes: What it may take; the gate's overhead is already off.
        overhead_bytes: What the gate kept back; None when the server refused.
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
    """The model does not fit its device whole, and ``require_full`` asked for that."""


class QueueFullError(RunnerError):
    """Too many requests wait. Retry after the delay, or use another runner.

    Attributes:
        retry_delay_seconds: How long to wait before a retry; None if the server
            did not say.
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
    """The runner stops, or the model of the call is being unloaded. Use another runner."""


class GenerationFailedError(RunnerError):
    """MLX raised in a step of this request's batch. The runner recovers; retrying is safe."""


class RunnerTimeoutError(RunnerError):
    """A wait ran out. Retry, raise the timeout, or look at the runner's log.

    Attributes:
        phase: Which wait: ``"call"`` (a unary call's deadline), ``"start"`` (the
            ready line), ``"load"`` (a load that does not move), ``"first_token"``
            or ``"idle"`` (a stream).
        timeout_seconds: How long was waited.
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
    """The child process is gone; every call that was pending in it ends with this.

    Attributes:
        exit_code: As ``subprocess`` gives it: negative is the number of the
            signal that ended the process; None if it was never started, and where the
            system does not tell, because this process ignores SIGCHLD.
        exit_reason: The same in words ("exit code 1", "killed by SIGKILL ...").
        stderr_tail: The last lines that this process, and no other, wrote to
            its standard error.
        last_memory_bytes: What the process held (its resident set) when its status
            was last seen; None if it never was.
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
    """A completion's stream ended in good order but without its last message.

    What was received is a part of the text. The call had no effect beyond it:
    retrying is safe.
    """


class NotSupportedError(RunnerError):
    """What was asked for does not exist here: retrying never helps."""


class UnsupportedPlatformError(NotSupportedError):
    """MLX does not run on this operating system or processor."""
