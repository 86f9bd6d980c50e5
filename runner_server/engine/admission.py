"""What a load asks before it takes memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from runner_common.memory.need import MemoryNeed


class Admission(Protocol):
    """Decides whether a load may take memory."""

    def admit(self, model: str, need: MemoryNeed, *, override: bool) -> int:
        """Set memory aside for a model.

        Args:
            model: Its directory.
            need: What it takes.
            override: Go on even if it does not fit.

        Returns:
            The bytes that it may take: at least ``need.required_bytes``.

        Raises:
            InsufficientMemory: It does not fit.
        """
        ...

    def release(self) -> None:
        """Give up what was set aside for this process."""
        ...


class _Unchecked:
    """Lets everything through, for loads without a machine around them."""

    def admit(self, model: str, need: MemoryNeed, *, override: bool) -> int:  # noqa: ARG002
        """See :meth:`Admission.admit`."""
        return need.total_bytes

    def release(self) -> None:
        """See :meth:`Admission.release`."""


UNCHECKED: Admission = _Unchecked()
"""Lets every load through; limits that the load itself names still hold."""
