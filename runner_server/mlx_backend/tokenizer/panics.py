"""Turns panics of the tokenizers library into ordinary exceptions.

The library's Python binding raises a Rust panic as a ``BaseException``, meant to end the process. A
tokenizer from an untrusted source can panic for some text. This must neither end the engine's
thread nor leave a call without an answer.
"""

from __future__ import annotations

from types import TracebackType

_BINDING = "pyo3_runtime"
"""The module name of the panic's class, which cannot be imported."""


class PanicError(RuntimeError):
    """The tokenizers library panicked."""


class _NoPanics:
    """Context manager turning a panic into a :class:`PanicError`. Can be shared by threads."""

    def __enter__(self) -> None:
        """Do nothing, to keep entering cheap."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        """Raise a :class:`PanicError` for a panic."""
        if kind is not None and kind.__module__ == _BINDING:
            raise PanicError(f"the tokenizer panicked: {error}") from error


NO_PANICS = _NoPanics()
"""``with NO_PANICS:`` goes around calls of the tokenizers library."""
