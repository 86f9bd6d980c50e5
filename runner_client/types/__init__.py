"""Parameters and results of calls, as frozen dataclasses independent of protobuf.

The proto file documents each field in detail. Here durations are float seconds, a missing
value is None, and an enum value that only a newer server knows becomes ``UNKNOWN``.
"""

from runner_client.settings import (
    Dtype,
    LoadKeywords,
    LoadOptions,
    RestartPolicy,
    Timeouts,
    TlsFiles,
)
from runner_client.types.chats import (
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    RenderedChat,
    Role,
    Tool,
    ToolCall,
)
from runner_client.types.completions import (
    Completion,
    CompletionChunk,
    DoneReason,
    Options,
    PromptProgress,
    TokenLogprob,
    TopLogprob,
)
from runner_client.types.constraints import (
    Choice,
    Constraint,
    JsonObject,
    JsonSchema,
    LarkGrammar,
    Regex,
)
from runner_client.types.embeddings import Embedding
from runner_client.types.runners import (
    Capabilities,
    DeviceInfo,
    DraftModel,
    DrainResult,
    LoadEstimate,
    LoadResult,
    MemoryUsage,
    Model,
    Rank,
    State,
    Status,
)

__all__ = [
    "Capabilities",
    "ChatChunk",
    "ChatCompletion",
    "ChatMessage",
    "Choice",
    "Completion",
    "CompletionChunk",
    "Constraint",
    "DeviceInfo",
    "DoneReason",
    "DraftModel",
    "DrainResult",
    "Dtype",
    "Embedding",
    "JsonObject",
    "JsonSchema",
    "LarkGrammar",
    "LoadEstimate",
    "LoadKeywords",
    "LoadOptions",
    "LoadResult",
    "MemoryUsage",
    "Model",
    "Options",
    "PromptProgress",
    "Rank",
    "Regex",
    "RenderedChat",
    "RestartPolicy",
    "Role",
    "State",
    "Status",
    "Timeouts",
    "TlsFiles",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "TopLogprob",
]
