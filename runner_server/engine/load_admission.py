"""Admission of loads by the free memory of the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from runner_common.memory.need import MemoryNeed


class Admission(Protocol):
    """Admits loads for which the machine has memory, and reserves it."""

    def admit(self, model: str, need: MemoryNeed, *, override: bool) -> int:
        """Reserve memory for a model.

        Args:
            model: Directory of the model.
            need: Memory that the model takes.
            override: Whether to admit the load even if it does not fit.

        Returns:
            The bytes that the model may take, at least ``need.required_bytes``.

        Raises:
            InsufficientMemory: The model does not fit.
        """
        ...

    def release(self) -> None:
        """Release the reservation of this process."""
        ...


class _Unchecked:
    """Admits every load without checking the machine's memory."""

    def admit(self, model: str, need: MemoryNeed, *, override: bool) -> int:  # noqa: ARG002
        """See :meth:`Admission.admit`."""
        return need.total_bytes

    def release(self) -> None:
        """See :meth:`Admission.release`."""


UNCHECKED: Admission = _Unchecked()
"""Admits every load. A ``memory_limit_bytes`` of the load still applies."""
