"""Names, error table, limits and defaults of ``mlxrunner.v1``, shared by client and server.

The faults of the server, the exceptions of the client, the fake runner and docs/errors.md follow
:data:`ERRORS`. The protocol itself is ``proto/mlxrunner/v1/runner.proto``.
"""

from __future__ import annotations

from dataclasses import dataclass

ERROR_DOMAIN = "mlxrunner.v1"
"""The ``domain`` of every ``google.rpc.ErrorInfo``."""

SERVICE_NAME = "mlxrunner.v1.RunnerService"
"""Full name of the service, as used by health and reflection."""

POOL_SERVICE_NAME = "mlxrunner.v1.PoolService"
"""Full name of the service that controls a pool."""

HEALTH_SERVICES = ("", SERVICE_NAME, "plugin")
"""Service names accepted by health checks; go-plugin asks for ``plugin``."""

TOKEN_VARIABLE = "MLX_RUNNER_TOKEN"  # noqa: S105 - not a secret
"""Environment variable with the token that a server requires of its callers."""

USE_TOKEN_VARIABLE = "MLX_RUNNER_USE_TOKEN"  # noqa: S105 - not a secret
"""Environment variable with a second token, whose holders may only use the loaded model."""

PREFIX_CACHE_DIR_VARIABLE = "MLX_RUNNER_PREFIX_CACHE_DIR"
"""Environment variable with the directory of a server's prefix cache on disk."""

PREFIX_CACHE_DISK_VARIABLE = "MLX_RUNNER_PREFIX_CACHE_DISK"
"""Environment variable with the size of a server's prefix cache on disk."""

DEFAULT_PREFIX_CACHE_DISK_BYTES = 8 << 30
"""Size of a server's prefix cache on disk, unless it is given."""

DEFAULT_CONTEXT_LENGTH = 4096
"""Longest context, in tokens, unless ``Load`` requests another one."""

DEFAULT_PARALLEL = 4
"""Most requests decoded together, unless ``Load`` requests another number."""

MAX_DRAFT = 16
"""Most tokens of a draft, which one step checks."""

KV_BITS = (0, 4, 8)
"""Bits of a number in the KV caches; 0 for the number format of the weights."""

MAX_PARALLEL = 256
"""Largest number of requests decoded together."""

MAX_LOGPROBS = 20
"""Most alternatives reported for each generated token."""

MAX_LOGPROB_TOKEN_IDS = 128
"""Most token ids whose log probabilities are reported for each generated token."""

MAX_PRIORITY = 100
"""Highest priority of a completion; the lowest one is its negative."""

MAX_STOPS = 64
"""Most stop strings of a request."""

MAX_STOP_TOKEN_IDS = 1024
"""Most stop token ids of a request."""

MAX_MODEL_CHARS = 4096
"""Longest name of a model in a request."""

MAX_REQUEST_ID_CHARS = 128
"""Longest ``request_id``."""

MAX_CACHE_SALT_CHARS = 128
"""Longest ``cache_salt``."""

MAX_ADAPTERS = 64
"""Most adapters of a load."""

MAX_ADAPTER_NAME_CHARS = 128
"""Longest name of an adapter."""

MAX_ABORTED_IDS = 1024
"""Most ids of an ``Abort``."""

MAX_EMBED_INPUTS = 256
"""Most texts of an ``Embed``, if their vectors fit one message."""

MAX_LOGIT_BIASES = 1024
"""Most token ids with a logit bias of a request."""

MAX_CONSTRAINT_BYTES = 65_536
"""Largest text of a constraint, and of all texts of a choice together. A larger schema could take
seconds to compile: 5,000 optional properties in 125,000 bytes took 3.4 s."""

MAX_CHOICES = 1024
"""Most texts of a choice."""

MAX_SCHEMA_DEPTH = 100
"""Deepest nesting of a JSON schema's objects and arrays."""

CONSTRAINT_KINDS = ("json_schema", "json_object", "regex", "lark", "choice")
"""Kinds of constraints: the members of ``Constraint.kind``, and ``ConstraintKind`` in lower case
without its prefix."""

MIN_CONTEXT_LENGTH = 2
"""Shortest context that ``Load`` accepts, in tokens: one of a prompt and one generated."""

MAX_CONTEXT_LENGTH = 2**31 - 1

MAX_BYTES = 2**63 - 1
"""Largest size that a request can hold."""

MAX_DRAIN_SECONDS = 86_400.0
"""Longest timeout of ``Drain``."""

MIN_WATCH_SECONDS = 0.1
"""Shortest interval of ``WatchStatus``."""

MAX_WATCH_SECONDS = 3600.0
"""Longest interval of ``WatchStatus``."""

MAX_PORT = 65_535

MAX_REQUEST_BYTES = 64 * 2**20
"""Largest message that a runner accepts. Clients accept responses of the same size."""


@dataclass(frozen=True, slots=True)
class ErrorRule:
    """One row of the error table.

    Attributes:
        reason: ``ErrorInfo.reason``, and ``ErrorReason`` without its prefix.
        code: Name of the gRPC status code.
        exception: Class in ``runner_client.errors``.
        when: The cause of the failure.
        remedy: What the caller can do.
    """

    reason: str
    code: str
    exception: str
    when: str
    remedy: str


ERRORS = (
    ErrorRule(
        "INVALID_FIELD",
        "INVALID_ARGUMENT",
        "InvalidRequestError",
        "a field is missing or out of range; `BadRequest` names it",
        "correct the request",
    ),
    ErrorRule(
        "PROMPT_TOO_LONG",
        "INVALID_ARGUMENT",
        "PromptTooLongError",
        "prompt and one token do not fit the context",
        "shorten it, or load with a larger context",
    ),
    ErrorRule(
        "MODEL_NOT_FOUND",
        "NOT_FOUND",
        "ModelNotFoundError",
        "no such directory or cached hub id",
        "correct `model`; nothing is downloaded",
    ),
    ErrorRule(
        "MODEL_UNSUPPORTED",
        "FAILED_PRECONDITION",
        "ModelUnsupportedError",
        "the files cannot be loaded, need their own code, or would be computed inexactly",
        "use another model",
    ),
    ErrorRule(
        "MODEL_NOT_LOADED",
        "FAILED_PRECONDITION",
        "ModelNotLoadedError",
        "no model is loaded, one is being loaded, or the call names another",
        "call `Load`, wait, or correct `model`",
    ),
    ErrorRule(
        "BUSY",
        "FAILED_PRECONDITION",
        "BusyError",
        "another load or unload is running",
        "wait, or cancel it",
    ),
    ErrorRule(
        "INSUFFICIENT_MEMORY",
        "RESOURCE_EXHAUSTED",
        "InsufficientMemoryError",
        "the estimate does not fit the available memory",
        "free memory, or ask for less",
    ),
    ErrorRule(
        "QUEUE_FULL",
        "RESOURCE_EXHAUSTED",
        "QueueFullError",
        "too many requests are queued; `RetryInfo` says for how long",
        "retry then, or use another runner",
    ),
    ErrorRule(
        "SHUTTING_DOWN",
        "UNAVAILABLE",
        "ShuttingDownError",
        "the process is stopping or draining, or the model was unloaded",
        "use another runner",
    ),
    ErrorRule(
        "GENERATION_FAILED",
        "INTERNAL",
        "GenerationFailedError",
        "MLX raised an error and the runner recovers, or the model's logits are not finite",
        "retry",
    ),
    ErrorRule(
        "UNAUTHENTICATED",
        "UNAUTHENTICATED",
        "AuthenticationError",
        "the call has no token, or a wrong one",
        "send `authorization: Bearer TOKEN`",
    ),
    ErrorRule(
        "ABORTED",
        "ABORTED",
        "RequestAbortedError",
        "the request was ended by `Abort`, or by a `Drain` whose timeout passed",
        "do not retry it automatically",
    ),
    ErrorRule(
        "PERMISSION_DENIED",
        "PERMISSION_DENIED",
        "PermissionDeniedError",
        "the call's token may use the loaded model, but not control the runner",
        "send the token with all rights",
    ),
)

CODES = {rule.reason: rule.code for rule in ERRORS}
