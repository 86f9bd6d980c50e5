"""Exceptions for every failure a caller can see, and their mapping to gRPC statuses.

Each exception carries a message for people and numbers for programs. :func:`to_status` turns it
into a ``google.rpc.Status`` with one ``ErrorInfo``, and with ``BadRequest`` or ``RetryInfo`` where
the protocol requires them. No other exception reaches a client.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import grpc
from google.protobuf.message import Message
from google.rpc import status_pb2

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.contract import CODES
from runner_common.serving.statuses import bad_request, error_status, retry_info, violations_text

_MAX_NAME_CHARS = 100
"""Most characters of a model's name in a message that has two."""


class RunnerFault(Exception):
    """Base class of failures, each with a gRPC code and an ``ErrorReason``.

    Args:
        message: Description of the failure with its numbers, and what to do.
        metadata: The numbers for programs: lowerCamelCase keys, units in the key.

    Attributes:
        code: The gRPC status code of the class.
        reason: The ``ErrorReason`` of the class.
        metadata: The ``ErrorInfo.metadata`` to send.
    """

    code: ClassVar[grpc.StatusCode]
    reason: ClassVar[pb.ErrorReason.ValueType]

    def __init_subclass__(cls, *, reason: str) -> None:
        """Set the reason of a subclass, and the gRPC code that the contract assigns to it."""
        super().__init_subclass__()
        cls.code = grpc.StatusCode[CODES[reason]]
        cls.reason = pb.ErrorReason.Value(f"ERROR_REASON_{reason}")

    def __init__(self, message: str, **metadata: str | int) -> None:
        super().__init__(message)
        self.metadata = {key: str(value) for key, value in metadata.items()}

    def details(self) -> list[Message]:
        """Return the error details to send besides ``ErrorInfo``."""
        return []


class InvalidField(RunnerFault, reason="INVALID_FIELD"):
    """Fields of the request are missing or out of range.

    Args:
        violations: Pairs of a field's path and a description of its problem; at least one.
    """

    def __init__(self, violations: Sequence[tuple[str, str]]) -> None:
        super().__init__(violations_text(violations))
        self.violations = violations

    def details(self) -> list[Message]:
        """Return one ``BadRequest`` naming the fields."""
        return [bad_request(self.violations)]


class PromptTooLong(RunnerFault, reason="PROMPT_TOO_LONG"):
    """The prompt does not fit the context.

    Args:
        prompt_tokens: Number of tokens in the prompt.
        context_length: Number of tokens the context holds.
        is_least: Whether ``prompt_tokens`` is a lower bound because tokenizing stopped early.
    """

    def __init__(self, prompt_tokens: int, context_length: int, *, is_least: bool = False) -> None:
        super().__init__(
            f"the prompt has {'at least ' * is_least}{prompt_tokens} tokens and the context holds "
            f"{context_length}, including at least one new token; shorten the prompt or load with "
            "a larger context_length",
            promptTokens=prompt_tokens,
            contextLength=context_length,
        )


class TextTooLong(RunnerFault, reason="PROMPT_TOO_LONG"):
    """A text is longer than the model embeds.

    Args:
        index: Index of the text in the request.
        tokens: Number of tokens of the text, with the special ones around it.
        limit: Most tokens of a text.
        is_file_limit: Whether the model's files set the limit, rather than the context.
        is_least: Whether ``tokens`` is a lower bound because tokenizing stopped early.
    """

    def __init__(
        self, index: int, tokens: int, limit: int, *, is_file_limit: bool, is_least: bool = False
    ) -> None:
        advice = (
            "by max_seq_length in sentence_bert_config.json; split it"
            if is_file_limit
            else "in its context; split it, or load with a larger context_length"
        )
        super().__init__(
            f"inputs[{index}] has {'at least ' * is_least}{tokens} tokens and the model embeds at "
            f"most {limit} {advice}",
            promptTokens=tokens,
            contextLength=limit,
        )


class ModelNotFound(RunnerFault, reason="MODEL_NOT_FOUND"):
    """No model exists at the requested path or hub id."""


class ModelUnsupported(RunnerFault, reason="MODEL_UNSUPPORTED"):
    """The files are not a model this runner can load, or need custom code to run."""


class ModelNotLoaded(RunnerFault, reason="MODEL_NOT_LOADED"):
    """The call needs a model and none is loaded, or it names another one.

    Args:
        progress: Progress of the load under way, 0 to 100; None if there is none.
        wanted: The name in the call; empty if it has none.
        loaded: The name of the loaded model; empty if none is loaded.
    """

    def __init__(self, progress: int | None = None, *, wanted: str = "", loaded: str = "") -> None:
        if loaded:
            # !r, because a name with line breaks could forge log lines.
            text = (
                f"the loaded model is {loaded[:_MAX_NAME_CHARS]!r}, and the call names "
                f"{wanted[:_MAX_NAME_CHARS]!r}; correct model, or use another runner"
            )
        elif progress is None:
            text = "no model is loaded; call Load first"
        else:
            text = f"the model is being loaded ({progress} %); wait until Status says STATE_ACTIVE"
        super().__init__(text, **({"model": wanted} if wanted else {}))


class Busy(RunnerFault, reason="BUSY"):
    """Another load or unload is running."""

    def __init__(self) -> None:
        super().__init__("a load or unload is running; wait for it, or cancel its Load call")


class InsufficientMemory(RunnerFault, reason="INSUFFICIENT_MEMORY"):
    """A load or a request does not fit the memory available to it."""


class QueueFull(RunnerFault, reason="QUEUE_FULL"):
    """The queue is full.

    Args:
        queued: Number of requests in the queue.
        retry_seconds: Estimated time until the queue has a free slot.
    """

    def __init__(self, queued: int, retry_seconds: float) -> None:
        super().__init__(
            f"{queued} requests are waiting; retry in {retry_seconds:.1f} s or use another runner",
            queuedCount=queued,
        )
        self.retry_seconds = retry_seconds

    def details(self) -> list[Message]:
        """Return one ``RetryInfo``."""
        return [retry_info(self.retry_seconds)]


class ShuttingDown(RunnerFault, reason="SHUTTING_DOWN"):
    """The process is stopping or draining, or the model of the call is being unloaded."""


class Unauthenticated(RunnerFault, reason="UNAUTHENTICATED"):
    """The call does not carry the server's token."""


class Aborted(RunnerFault, reason="ABORTED"):
    """The completion was ended on purpose, not by its own client's call.

    Args:
        by: The agent that ended it.
    """

    def __init__(self, by: str) -> None:
        super().__init__(f"the request was ended by {by}; do not retry it automatically")


class PermissionDenied(RunnerFault, reason="PERMISSION_DENIED"):
    """The call carries the token for use, and its method needs the token with all rights."""


class GenerationFailed(RunnerFault, reason="GENERATION_FAILED"):
    """MLX or the server raised an unexpected error, or the model's logits are not finite."""


def not_finite_advice(dtype: str) -> str:
    """Return advice for a model with NaN or infinite logits and weights held as ``dtype``."""
    broken = "its files are damaged, or not meant for this kind of model"
    if dtype == "float32":
        return broken
    return f"load it with dtype float32, or bfloat16 instead of float16; otherwise {broken}"


def reason_name(fault: RunnerFault) -> str:
    """Return a fault's reason as callers see it."""
    return pb.ErrorReason.Name(fault.reason).removeprefix("ERROR_REASON_")


def to_status(fault: RunnerFault) -> status_pb2.Status:
    """Convert a fault to the status sent on the wire, under 2 KB."""
    return error_status(reason_name(fault), str(fault), fault.metadata, fault.details())
