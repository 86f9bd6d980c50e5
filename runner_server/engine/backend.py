"""The interface between the engine and a model library.

``runner_server.mlx_backend`` implements the interface with MLX, the tests with plain Python.
Except for :meth:`Backend.memory` and the codec, everything is called on the engine's thread only.
Every call on an executor may raise :class:`BackendLost`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from runner_server.engine.prefill_queue import PrefillLimits
from runner_server.engine.prefix_cache import Match
from runner_server.engine.types import LoadSpec, MemoryCounters, ModelInfo, Rank, Sampling
from runner_server.engine.work import WorkItem, WorkReport


class BackendLost(Exception):
    """The model library cannot continue in this process; callers see the message."""


class Codec(Protocol):
    """A thread-safe tokenizer."""

    def encode(self, text: str, *, as_prompt: bool) -> list[int]:
        """Tokenize text; ``as_prompt`` adds the initial tokens of a prompt."""
        ...

    def fewest_tokens(self, text: str, enough: int) -> int:
        """Return a lower bound for the tokens of a very long text, computed from a part.

        Tokenizing takes half a second and hundreds of megabytes of memory for each megabyte of
        text. A bound up to ``enough`` is inconclusive: the text must be tokenized.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids into text; U+FFFD replaces invalid bytes."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes of a token anywhere but at the beginning of a text.

        Returns:
            The bytes; None if they depend on the tokens before.
        """
        ...


class Executor(Protocol):
    """Rows of one batch, and the work that the scheduler plans for them."""

    def add(self, row: int, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Add a row; work items prefill the prompt and let the row join the batch."""
        ...

    def find_prefix(self, prompt_ids: Sequence[int]) -> Match:
        """Return the length of the longest prefix of a prompt in the prefix cache."""
        ...

    def run(self, item: WorkItem) -> WorkReport:
        """Run a work item.

        The caller removes a row that is reported as :class:`NotFinite`.
        """
        ...

    def preempt(self, row: int) -> None:
        """Take a row out of the batch; it keeps its KV cache, and may join again."""
        ...

    def remove(self, rows: Collection[int]) -> None:
        """Remove rows, in the batch or not, and free their memory."""
        ...

    def close(self) -> None:
        """Free everything; the executor cannot be used again."""
        ...


class LoadedModel(Protocol):
    """A model in memory."""

    @property
    def info(self) -> ModelInfo:
        """Description of the model and the limits in force."""
        ...

    @property
    def codec(self) -> Codec:
        """Tokenizer of the model."""
        ...

    @property
    def kv_bytes(self) -> Callable[[int], int]:
        """Bytes of KV cache of one sequence, by tokens; keeps no weights alive."""
        ...

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """Change the byte budget of the prefix cache, evicting entries to meet the budget."""
        ...

    @property
    def prefill_limits(self) -> PrefillLimits:
        """Limits of prefill chunks; keeps no weights alive."""
        ...

    def new_executor(self) -> Executor:
        """Return an executor without rows."""
        ...


@dataclass(frozen=True, eq=False)
class ModelHandle:
    """Description and tokenizer of a loaded model, without weights, for other threads.

    Attributes:
        info: Description of the model and the limits in force.
        codec: Tokenizer of the model.
        kv_bytes: See :attr:`LoadedModel.kv_bytes`.
    """

    info: ModelInfo
    codec: Codec
    kv_bytes: Callable[[int], int]


class Ranks(Protocol):
    """The other processes with parts of the model."""

    @property
    def others(self) -> Sequence[Rank]:
        """The other ranks, each with the memory reported last."""
        ...

    def watch(self, on_lost: Callable[[str], object], on_stop: Callable[[], object]) -> None:
        """Set the callbacks for a lost rank (with the reason) and for a rank's stop request.

        They may be called on any thread.
        """
        ...


class Backend(Protocol):
    """The model library."""

    def open(self) -> str:
        """Import the library; return the name of the computing device."""
        ...

    def check(self, spec: LoadSpec) -> None:
        """Check in milliseconds whether the files of a model exist and allow the load.

        The loaded model is not touched.

        Raises:
            RunnerFault: A load would be refused, regardless of memory.
        """
        ...

    def load(self, spec: LoadSpec, report: Callable[[int], None]) -> LoadedModel:
        """Load a model.

        Args:
            spec: The model and its options.
            report: Called with the progress, 0 to 100, several times a second. Calls come
                one at a time, possibly from threads that read weights. An exception that
                it raises ends the load.

        Raises:
            RunnerFault: One of the faults documented for ``Load``.
            BackendLost: The library cannot load anything any more.
        """
        ...

    def memory(self) -> MemoryCounters:
        """Return the memory of the library. Thread-safe; works before ``open`` too."""
        ...

    def release(self, *, for_next: bool = False) -> None:
        """Free the memory of a dropped model.

        Args:
            for_next: A load follows, and takes over the memory reservation; otherwise the
                reservation ends too.
        """
        ...

    def trim(self) -> None:
        """Return freed memory to the system."""
        ...

    def close(self) -> None:
        """Stop using the library on this thread."""
        ...
