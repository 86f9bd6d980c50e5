"""The interface between the engine and a model library.

``runner_server.mlx_backend`` implements the interface with MLX, the tests with plain Python.
The engine's thread makes all calls, except that :meth:`Backend.memory`, the codec, the grammars,
the function ``kv_bytes`` and :class:`Ranks` are used on other threads too. Every call on an
executor may raise :class:`BackendLost`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from runner_server.chat.reasoning import Reasoning
from runner_server.engine.prefill_queue import PrefillLimits
from runner_server.engine.prefix_cache import Match
from runner_server.engine.types import (
    CachePolicy,
    Constraint,
    LoadSpec,
    MemoryCounters,
    ModelInfo,
    Rank,
    Sampling,
)
from runner_server.engine.work import WorkItem, WorkReport


class BackendLost(Exception):
    """The model library cannot continue in this process. Callers see the message."""


class MarkedCodec(Protocol):
    """A thread-safe tokenizer of texts in which marked special tokens are text.

    A mark is a character within the token that the text lacks.
    """

    def mark(self, texts: Sequence[str], mark: str) -> list[str]:
        """Return texts with a mark in every special token.

        The beginning of a special token at the end of a text is marked too, because the text after
        it may have the rest.

        Args:
            texts: The texts.
            mark: A character that they lack.
        """
        ...

    def encode(self, text: str, mark: str) -> list[int]:
        """Tokenize a text without the marks; special tokens with a mark are text.

        Args:
            text: The text.
            mark: The mark.

        Raises:
            InvalidField: Special tokens cannot be text for this tokenizer.
        """
        ...


class Codec(Protocol):
    """A thread-safe tokenizer."""

    def encode(self, text: str, *, as_prompt: bool, literal: bool = False) -> list[int]:
        """Tokenize text.

        Args:
            text: The text.
            as_prompt: Whether to add the initial tokens of a prompt.
            literal: Whether special tokens written in the text are text.

        Raises:
            InvalidField: Special tokens cannot be text for this tokenizer.
        """
        ...

    def marked(self, template: str) -> MarkedCodec:
        """Return the tokenizer for prompts in which only a template's special tokens count.

        Args:
            template: The template. Markers in it that are added tokens are special tokens here,
                even if the tokenizer's file does not say so.
        """
        ...

    def encode_whole(self, text: str, *, literal: bool = False) -> list[int]:
        """Tokenize a text with the special tokens before and after it, for an embedding.

        Args:
            text: The text.
            literal: See :meth:`encode`.

        Raises:
            InvalidField: Special tokens cannot be text for this tokenizer.
        """
        ...

    def fewest_tokens(self, text: str, enough: int, *, literal: bool = False) -> int:
        """Return a lower bound of a very long text's token count, by tokenizing only a part.

        Tokenizing takes half a second and hundreds of megabytes of memory for each megabyte of
        text.

        Args:
            text: The text.
            enough: The count in question. If the bound is not above it, only tokenizing the whole
                text can tell whether the count is.
            literal: See :meth:`encode`.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids into text; U+FFFD replaces invalid bytes."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes a token contributes to a text, unless the token is the first.

        Returns:
            The bytes; None if they depend on the preceding tokens.
        """
        ...


class Matcher(Protocol):
    """The position of one text in a grammar. Belongs to the engine's thread once its row is added.

    The executor advances it by a token when it reports the token.
    """

    @property
    def is_satisfied(self) -> bool | None:
        """True if the text so far obeys the constraint; None if only reasoning is limited."""
        ...

    def accepts(self, text: str) -> bool | None:
        """Return whether another text would obey the constraint; None as above."""
        ...


class Grammar(Protocol):
    """A compiled constraint. Thread-safe."""

    def start(self) -> Matcher:
        """Return a matcher at the beginning of a text."""
        ...


class Grammars(Protocol):
    """Compiles constraints for the tokens of one model. Thread-safe; keeps no weights alive."""

    def compile(self, constraint: Constraint) -> Future[Grammar]:
        """Begin to compile a constraint, on another thread, unless it is cached.

        Several callers may share the future, so none of them may cancel it.

        Returns:
            A future that resolves to the grammar, or raises ``InvalidField``, which names the place
            in the constraint, or says what the model or the server lacks.
        """
        ...

    def after_reasoning(self, reasoning: Reasoning, grammar: Grammar | None) -> Future[Grammar]:
        """Return the grammar of answers that may reason first, from another thread.

        Args:
            reasoning: The reasoning, with its markers and its limit.
            grammar: The grammar of the text after it; None for any text.

        Returns:
            A future that resolves to the grammar, or raises ``InvalidField``.
        """
        ...


class Executor(Protocol):
    """Runs the scheduler's work items on the rows of one batch."""

    def add(
        self,
        row: int,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        cache_policy: CachePolicy,
        matcher: Matcher | None = None,
        adapter: str = "",
    ) -> None:
        """Add a row. Later work items prefill the prompt and make the row join the batch.

        Args:
            row: Id of the row.
            prompt_ids: The prompt.
            sampling: The sampling options.
            cache_policy: Use of the prefix cache.
            matcher: Limits the tokens that may be drawn; made by the grammars of the same model.
            adapter: Name of the row's adapter; empty for the model without one.
        """
        ...

    def add_texts(self, row: int, texts: Sequence[Sequence[int]]) -> None:
        """Add texts to embed. Later work items evaluate them; :meth:`remove` frees them.

        Args:
            row: Id of the request, of which no row has the same.
            texts: The tokens of each text.
        """
        ...

    def find_prefix(self, prompt_ids: Sequence[int], salt: str) -> Match:
        """Return the length of the longest prefix of a prompt among the entries of a salt."""
        ...

    def find_on_disk(self, prompt_ids: Sequence[int], salt: str) -> int:
        """Return the number of leading tokens of a prompt on disk, without a read."""
        ...

    def run(self, item: WorkItem) -> WorkReport:
        """Run a work item.

        The caller must remove each row reported with a ``Failure``.
        """
        ...

    def preempt(self, row: int) -> None:
        """Take a row out of the batch. The row keeps its KV cache and may join again."""
        ...

    def remove(self, rows: Collection[int]) -> None:
        """Remove rows, in the batch or not, and free their memory."""
        ...

    def close(self) -> None:
        """Free all rows. The executor cannot be used again."""
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
    def grammars(self) -> Grammars:
        """Compiler of constraints for the model's tokens."""
        ...

    @property
    def kv_bytes(self) -> Callable[[int], int]:
        """Function from tokens to the bytes of one sequence's KV cache; keeps no weights alive."""
        ...

    def limit_prefix_cache(self, limit_bytes: int) -> None:
        """Change the byte budget of the prefix cache, evicting entries to meet the budget."""
        ...

    def save_prefixes(self, *, is_idle: bool) -> bool:
        """Copy a part of the prefix cache for the writer of the disk.

        Args:
            is_idle: Whether to wait some milliseconds for that thread.

        Returns:
            False if there is nothing to write.
        """
        ...

    def close(self) -> None:
        """Write the rest of the prefix cache to disk, for at most two seconds."""
        ...

    @property
    def prefill_limits(self) -> PrefillLimits:
        """Limits of prefill chunks; keeps no weights alive."""
        ...

    @property
    def max_draft(self) -> int:
        """Most tokens of a ``DecodeItem.draft``; 0 if the model's caches cannot be cut back."""
        ...

    def new_executor(self) -> Executor:
        """Return an executor without rows."""
        ...


@dataclass(frozen=True, eq=False)
class ModelHandle:
    """Description and tokenizer of a loaded model, without the weights, for any thread.

    Attributes:
        info: Description of the model and the limits in force.
        codec: Tokenizer of the model.
        grammars: Compiler of constraints.
        kv_bytes: See :attr:`LoadedModel.kv_bytes`.
        requested: The name that the load gave.
    """

    info: ModelInfo
    codec: Codec
    grammars: Grammars
    kv_bytes: Callable[[int], int]
    requested: str

    @classmethod
    def of(cls, model: LoadedModel, requested: str) -> ModelHandle:
        """Return the handle of a model that was loaded by the name ``requested``."""
        return cls(model.info, model.codec, model.grammars, model.kv_bytes, requested)

    def is_named(self, name: str) -> bool:
        """Return True if a call that names ``name`` means this model."""
        return name in ("", self.requested, self.info.path)


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
        """Import the library; return the name of the device."""
        ...

    def check(self, spec: LoadSpec) -> None:
        """Check in milliseconds whether the files of a model exist and allow the load.

        A model that is loaded stays loaded.

        Raises:
            RunnerFault: A load would be refused, regardless of memory.
        """
        ...

    def load(self, spec: LoadSpec, report: Callable[[int], None]) -> LoadedModel:
        """Load a model.

        Args:
            spec: The model and its options.
            report: Called with the progress, 0 to 100, several times a second. Calls do not
                overlap, but may come from the threads that read weights. An exception from
                ``report`` ends the load.

        Raises:
            RunnerFault: One of the faults documented for ``Load``.
            BackendLost: The library cannot load any model from now on.
        """
        ...

    def memory(self) -> MemoryCounters:
        """Return the memory counters of the library. Thread-safe, also before ``open``."""
        ...

    def release(self, *, for_next: bool = False) -> None:
        """Free the memory of a model no longer referenced.

        Args:
            for_next: Whether a load follows. If so, the memory reservation is kept for it.
        """
        ...

    def trim(self) -> None:
        """Return freed memory to the system."""
        ...

    def close(self) -> None:
        """Shut the library down on this thread."""
        ...
