"""Panics of the tokenizers library as errors like others.

What panics in Rust comes out of its Python binding as a ``BaseException``, made for ending
the process. A tokenizer that a stranger wrote can panic for some text, and must end neither
the engine's thread nor leave a call without an answer.
"""

from __future__ import annotations

from types import TracebackType

_BINDING = "pyo3_runtime"
"""The module that the exception says it is from; it cannot be imported."""


class PanicError(RuntimeError):
    """The tokenizers library gave up in the middle of something."""


class _NoPanics:
    """Turns a panic inside a ``with`` block into a :class:`PanicError`; may be shared."""

    def __enter__(self) -> None:
        """Nothing: entering is to cost nothing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Raises what the panic is turned into."""
        if kind is not None and kind.__module__ == _BINDING:
            raise PanicError(f"the tokenizer panicked: {error}") from error


NO_PANICS = _NoPanics()
"""``with NO_PANICS:`` around calls of the tokenizers library."""
