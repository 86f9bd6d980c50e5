"""What the engine needs of a model library.

``runner_server.mlx_backend`` implements it with MLX; the tests implement it with
plain Python. Everything here except :meth:`Backend.memory` and the codec is
called on the engine thread only. Every call on a batch may raise :class:`BackendLost`.
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
    """The model library cannot go on in this process; says why, to callers too."""


class Codec(Protocol):
    """A tokenizer that any thread may use."""

    def encode(self, text: str, *, as_prompt: bool) -> list[int]:
        """Splits text into ids; ``as_prompt`` adds the tokens a prompt begins with."""
        ...

    def fewest_tokens(self, text: str, enough: int) -> int:
        """A number of tokens that a very long text has at least, from a part of it.

        Splitting takes half a second for each megabyte, and hundreds of times its memory. A
        number up to ``enough`` says nothing: the text must be split to know.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Joins ids into text; U+FFFD stands for bytes that are no character."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """The bytes that a token stands for, except at the beginning of a text.

        None if that depends on the tokens before it.
        """
        ...


class Batch(Protocol):
    """Rows that are prefilled and decoded together."""

    def add(self, row: int, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        """Begins a row; its prompt is evaluated in the steps that follow."""
        ...

    def remove(self, rows: Collection[int]) -> None:
        """Ends rows, in whatever phase they are, and frees what they held."""
        ...

    def preempt(self, row: int) -> None:
        """Sets a row aside that has generated a token; it keeps what it holds."""
        ...

    def resume(self, row: int) -> None:
        """Takes a row in again that was set aside; it goes on where it was."""
        ...

    def step(self) -> list[Event]:
        """Evaluates prompts for a slice of time, then makes one decode step.

        There is at least one row that is not set aside. A row that is reported as
        :class:`NotFinite` is to be removed.
        """
        ...

    def close(self) -> None:
        """Frees everything; the batch is not used again."""
        ...


class LoadedModel(Protocol):
    """A model in memory."""

    @property
    def info(self) -> ModelInfo:
        """What it is, and the limits in force."""
        ...

    @property
    def codec(self) -> Codec:
        """Its tokenizer."""
        ...

    @property
    def kv_bytes(self) -> Callable[[int], int]:
        """Tells the bytes of KV cache that one sequence of so many tokens takes; has no weights."""
        ...

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """Changes how much evaluated prompts may take, and drops what is beyond that."""
        ...

    def new_batch(self) -> Batch:
        """An empty batch."""
        ...


@dataclass(frozen=True, eq=False)
class ModelHandle:
    """What others than the engine may hold of a loaded model: no weights.

    Attributes:
        info: What it is, and the limits in force.
        codec: Its tokenizer.
        kv_bytes: See :attr:`LoadedModel.kv_bytes`.
    """

    info: ModelInfo
    codec: Codec
    kv_bytes: Callable[[int], int]


class Ranks(Protocol):
    """The other processes that hold parts of the model."""

    @property
    def others(self) -> Sequence[Rank]:
        """Who they are, and the memory that they told of last."""
        ...

    def watch(self, on_lost: Callable[[str], object], on_stop: Callable[[], object]) -> None:
        """Says whom to tell, on any thread, that one is gone (why), or asks for a stop."""
        ...


class Backend(Protocol):
    """The model library."""

    def open(self) -> str:
        """Imports the library; returns the name of the device that computes."""
        ...

    def check(self, spec: LoadSpec) -> None:
        """Looks whether a model is there and its files can be read, in milliseconds.

        What is loaded is not touched.

        Raises:
            RunnerFault: A load would be refused, whatever memory there is.
        """
        ...

    def load(self, spec: LoadSpec, report: Callable[[int], None]) -> LoadedModel:
        """Loads a model.

        Args:
            spec: What to load.
            report: Called with the progress, 0 to 100, every fraction of a second
                or so, one call at a time, also on threads that read weights; what it
                raises ends the load.

        Raises:
            RunnerFault: One of the faults that ``Load`` documents.
            BackendLost: Nothing can be loaded any more.
        """
        ...

    def memory(self) -> MemoryCounters:
        """What the library holds; callable from any thread, before ``open`` too."""
        ...

    def release(self, *, for_next: bool = False) -> None:
        """Gives back what a model has held.

        Args:
            for_next: A load follows, and takes over what was set aside; else that ends too.
        """
        ...

    def trim(self) -> None:
        """Gives freed memory back to the system."""
        ...

    def close(self) -> None:
        """Ends the use of the library on this thread."""
        ...
