"""Client library of mlx-grpc-runner: check memory, then spawn, call and stop runners.

``RunnerProcess`` and ``AsyncRunnerProcess`` host a model in a child process, ``RunnerPool`` and
``AsyncRunnerPool`` many models within one budget of memory.
``RunnerClient`` and ``AsyncRunnerClient`` call a runner at any address. ``errors``
documents the exception tree, ``estimate`` computes the memory that a model needs, and
``testing`` has a fake runner for your own tests.
"""

from runner_client.errors import (
    AuthenticationError,
    BusyError,
    GenerationFailedError,
    IncompleteStreamError,
    InsufficientMemoryError,
    InvalidRequestError,
    LoadRequiresFullError,
    ModelError,
    ModelNotFoundError,
    ModelNotLoadedError,
    ModelUnsupportedError,
    NotSupportedError,
    PermissionDeniedError,
    PromptTooLongError,
    QueueFullError,
    RequestAbortedError,
    RunnerError,
    RunnerExitedError,
    RunnerTimeoutError,
    RunnerUnavailableError,
    ShuttingDownError,
    UnsupportedPlatformError,
)
from runner_client.memory.estimation import MemoryEstimate
from runner_client.memory.gate import GateDecision, MemoryGate
from runner_client.pool.aio_pool import AsyncRunnerPool
from runner_client.pool.pool import RunnerPool
from runner_client.pool.scheduling.settings import ModelSettings, PoolSettings
from runner_client.pool.scheduling.states import ModelState
from runner_client.pool.types import MemoryReturn, PoolModel, PoolStatus
from runner_client.process.aio_process import AsyncRunnerProcess
from runner_client.process.process import RunnerProcess
from runner_client.rpc.aio_client import AsyncRunnerClient
from runner_client.rpc.aio_load import AsyncPendingLoad
from runner_client.rpc.aio_stream import AsyncChatStream, AsyncCompletionStream, AsyncStatusStream
from runner_client.rpc.client import RunnerClient
from runner_client.rpc.load import PendingLoad
from runner_client.rpc.stream import ChatStream, CompletionStream, StatusStream
from runner_client.types import (
    Capabilities,
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    Choice,
    Completion,
    CompletionChunk,
    DeviceInfo,
    DoneReason,
    DraftModel,
    DrainResult,
    Embedding,
    JsonObject,
    JsonSchema,
    LarkGrammar,
    LoadEstimate,
    LoadKeywords,
    LoadOptions,
    LoadResult,
    MemoryUsage,
    Model,
    Options,
    PromptProgress,
    Rank,
    Regex,
    RenderedChat,
    RestartPolicy,
    State,
    Status,
    Timeouts,
    TlsFiles,
    TokenLogprob,
    Tool,
    ToolCall,
    TopLogprob,
)

__version__ = "0.2.0"
"""The version in pyproject.toml, repeated because importlib.metadata would take a twentieth of the
time of this import."""

__all__ = [
    "AsyncChatStream",
    "AsyncCompletionStream",
    "AsyncPendingLoad",
    "AsyncRunnerClient",
    "AsyncRunnerPool",
    "AsyncRunnerProcess",
    "AsyncStatusStream",
    "AuthenticationError",
    "BusyError",
    "Capabilities",
    "ChatChunk",
    "ChatCompletion",
    "ChatMessage",
    "ChatStream",
    "Choice",
    "Completion",
    "CompletionChunk",
    "CompletionStream",
    "DeviceInfo",
    "DoneReason",
    "DraftModel",
    "DrainResult",
    "Embedding",
    "GateDecision",
    "GenerationFailedError",
    "IncompleteStreamError",
    "InsufficientMemoryError",
    "InvalidRequestError",
    "JsonObject",
    "JsonSchema",
    "LarkGrammar",
    "LoadEstimate",
    "LoadKeywords",
    "LoadOptions",
    "LoadRequiresFullError",
    "LoadResult",
    "MemoryEstimate",
    "MemoryGate",
    "MemoryReturn",
    "MemoryUsage",
    "Model",
    "ModelError",
    "ModelNotFoundError",
    "ModelNotLoadedError",
    "ModelSettings",
    "ModelState",
    "ModelUnsupportedError",
    "NotSupportedError",
    "Options",
    "PendingLoad",
    "PermissionDeniedError",
    "PoolModel",
    "PoolSettings",
    "PoolStatus",
    "PromptProgress",
    "PromptTooLongError",
    "QueueFullError",
    "Rank",
    "Regex",
    "RenderedChat",
    "RequestAbortedError",
    "RestartPolicy",
    "RunnerClient",
    "RunnerError",
    "RunnerExitedError",
    "RunnerPool",
    "RunnerProcess",
    "RunnerTimeoutError",
    "RunnerUnavailableError",
    "ShuttingDownError",
    "State",
    "Status",
    "StatusStream",
    "Timeouts",
    "TlsFiles",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "TopLogprob",
    "UnsupportedPlatformError",
]
