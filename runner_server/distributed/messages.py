"""Messages between rank 0 and the followers: dataclasses, encoded as lines of JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import msgspec

from runner_server.engine.types import CachePolicy, LoadSpec, MemoryCounters, Sampling
from runner_server.engine.work import PromptChunk, TextChunk

# -- from rank 0 -----------------------------------------------------------------


@dataclass(frozen=True)
class Beat:
    """Heartbeat; a follower's is :class:`Memory`."""


@dataclass(frozen=True)
class StartLoad:
    """Read this rank's part of a model. The one answer is ``LoadRead`` or ``LoadFailed``."""

    spec: LoadSpec


@dataclass(frozen=True)
class FinishLoad:
    """Every rank has read its part: warm up in step with the others."""


@dataclass(frozen=True)
class AbortLoad:
    """Drop the load: it was cancelled, or another rank failed."""


@dataclass(frozen=True)
class NewExecutor:
    """Create an executor without rows."""


@dataclass(frozen=True)
class AddRow:
    """Add a row to the executor; see ``Executor.add``."""

    row: int
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    cache_policy: CachePolicy


@dataclass(frozen=True)
class RunPrefill:
    """Run a ``PrefillItem``."""

    chunks: tuple[PromptChunk, ...]


@dataclass(frozen=True)
class RunDecode:
    """Run a ``DecodeItem``."""

    joining: tuple[int, ...]
    expected: int


@dataclass(frozen=True)
class AddTexts:
    """Add texts to embed; see ``Executor.add_texts``."""

    row: int
    texts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class RunEmbed:
    """Run an ``EmbedItem``."""

    chunks: tuple[TextChunk, ...]


@dataclass(frozen=True)
class PreemptRow:
    """Take a row out of the batch; see ``Executor.preempt``."""

    row: int


@dataclass(frozen=True)
class RemoveRows:
    """Remove rows from the executor."""

    rows: tuple[int, ...]


@dataclass(frozen=True)
class CloseExecutor:
    """Close the executor, freeing every row."""


@dataclass(frozen=True)
class LimitPrefixCache:
    """Change the byte budget of the prefix cache."""

    limit_bytes: int


@dataclass(frozen=True)
class Release:
    """Free the model; see ``Backend.release``."""

    for_next: bool


@dataclass(frozen=True)
class Trim:
    """Return freed memory to the system."""


@dataclass(frozen=True)
class Close:
    """End this rank normally."""


# -- from a follower -------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """First message of a connection.

    Attributes:
        secret: Rank 0's secret, shared by MLX.
        traits: Properties that must be the same on all ranks, such as versions.
    """

    secret: str
    rank: int
    host: str
    pid: int
    device: str
    traits: tuple[str, ...]


@dataclass(frozen=True)
class LoadRead:
    """This rank has read its part.

    Attributes:
        kv_share: Number of full-length sequences for which this rank has KV memory.
    """

    kv_share: float


@dataclass(frozen=True)
class LoadFailed:
    """This rank cannot load the model.

    Attributes:
        kind: Class name of the fault.
        text: Message of the fault.
        metadata: Numbers and names of the fault.
    """

    kind: str
    text: str
    metadata: dict[str, str]


@dataclass(frozen=True)
class Memory:
    """Memory of this rank, sent as a heartbeat.

    Attributes:
        counters: Memory of MLX.
        process_bytes: Resident set of the process.
        limit_bytes: Most memory that MLX may hold; 0 while no model is loaded.
    """

    counters: MemoryCounters
    process_bytes: int
    limit_bytes: int


@dataclass(frozen=True)
class AskStop:
    """This rank was asked to stop, for instance by a signal."""


FromLeader = (
    Beat
    | StartLoad
    | FinishLoad
    | AbortLoad
    | NewExecutor
    | AddRow
    | RunPrefill
    | RunDecode
    | AddTexts
    | RunEmbed
    | PreemptRow
    | RemoveRows
    | CloseExecutor
    | LimitPrefixCache
    | Release
    | Trim
    | Close
)
FromFollower = Hello | LoadRead | LoadFailed | Memory | AskStop
Message = FromLeader | FromFollower

_CLASSES: dict[str, type[Message]] = {each.__name__: each for each in get_args(Message)}


def encode(message: Message) -> bytes:
    """Encode a message as a line of JSON, an array of the class name and the fields."""
    return msgspec.json.encode((type(message).__name__, message)) + b"\n"


def decode(line: bytes) -> Message:
    """Decode a line, checking the type of every field.

    Raises:
        ValueError: The line is not a message.
    """
    try:
        name, fields = msgspec.json.decode(line, type=tuple[str, msgspec.Raw])
        return msgspec.json.decode(fields, type=_CLASSES[name])
    except (KeyError, msgspec.MsgspecError) as error:
        raise ValueError(f"not a message: {line[:80]!r} ({error})") from error
