"""Conversion of the tokenizers library's panics to ordinary exceptions.

The library's Python binding raises a Rust panic as a ``BaseException``, which is meant to end the
process. But a tokenizer from an untrusted source may panic on some texts, which must neither end
the engine's thread nor leave a call without an answer.
"""

from __future__ import annotations

from types import TracebackType

_BINDING = "pyo3_runtime"
"""The module name of the panic's class, which cannot be imported."""


class PanicError(RuntimeError):
    """The tokenizers library panicked."""


class _NoPanics:
    """Context manager that turns a panic into a :class:`PanicError`. Reentrant and thread-safe."""

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Raise a :class:`PanicError` if the exception is a panic."""
        if kind is not None and kind.__module__ == _BINDING:
            raise PanicError(f"the tokenizer panicked: {error}") from error


NO_PANICS = _NoPanics()
"""Use ``with NO_PANICS:`` around calls of the tokenizers library."""
