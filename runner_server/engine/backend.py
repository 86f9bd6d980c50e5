"""The interface between the engine and a model library.

``runner_server.mlx_backend`` implements the interface with MLX, the tests with plain Python.
Except for :meth:`Backend.memory` and the codec, everything is called on the engine's thread only.
Every call on a batch may raise :class:`BackendLost`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from runner_server.engine.types import (
    Event,
    LoadSpec,
    MemoryCounters,
    ModelInfo,
    Rank,
    Sampling,
)


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


class Batch(Protocol):
    """Rows prefilled and decoded together."""

    def add(self, row: int, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Add a row; the following steps prefill the prompt."""
        ...

    def remove(self, rows: Collection[int]) -> None:
        """Remove rows, preempted ones included, and free their memory."""
        ...

    def preempt(self, row: int) -> None:
        """Exclude a row with at least one token from the steps; keep the KV cache."""
        ...

    def resume(self, row: int) -> None:
        """Continue a preempted row."""
        ...

    def step(self) -> list[Event]:
        """Prefill prompts for a slice of time, then make one decode step.

        The batch must have a row that is not preempted. The caller removes a row that is
        reported as :class:`NotFinite`.
        """
        ...

    def close(self) -> None:
        """Free everything; the batch cannot be used again."""
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

    def new_batch(self) -> Batch:
        """Return an empty batch."""
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
