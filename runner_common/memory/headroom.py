"""Headroom: memory no runner may take, set by the same variables on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner_common.units import SIZE_FORMS, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner_common.host_memory.free import Backend

OVERHEAD_VARIABLE = "MLX_RUNNER_GPU_OVERHEAD"
"""Variable with the size to keep free for other users of the device, in addition to the minimum."""

MINIMUM_VARIABLE = "MLX_RUNNER_MEMORY_MINIMUM"
"""Variable with the size to keep free instead of the device's default minimum."""

METAL_MINIMUM_BYTES = 512 * 1024**2
"""Minimum on Metal, for memory that no model's size accounts for; as in the original gate."""

MINIMUM_BYTES = 457 * 1024**2
"""Minimum on every other device."""


class VariableError(ValueError):
    """An environment variable is not a size.

    Attributes:
        variable: Name of the variable.
    """

    def __init__(self, variable: str, value: str) -> None:
        super().__init__(f"{variable} is {value[:40]!r}; it must be a size: {SIZE_FORMS}")
        self.variable = variable


@dataclass(frozen=True, slots=True)
class Headroom:
    """Memory no runner may take.

    Attributes:
        minimum_bytes: Part for memory that no model's size accounts for.
        overhead_bytes: Part for other users of the device.
    """

    minimum_bytes: int
    overhead_bytes: int = 0

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], device_kind: Backend) -> Headroom:
        """Read both figures from the environment; the minimum defaults to the device's.

        Raises:
            VariableError: A variable is not a size.
        """
        minimum = variable_bytes(environ, MINIMUM_VARIABLE)
        return cls(
            minimum_bytes=usual_minimum(device_kind) if minimum is None else minimum,
            overhead_bytes=variable_bytes(environ, OVERHEAD_VARIABLE) or 0,
        )

    @property
    def total_bytes(self) -> int:
        """The sum of both figures."""
        return self.minimum_bytes + self.overhead_bytes

    def variables(self) -> dict[str, str]:
        """Return the environment variables for the same headroom in another process."""
        return {
            MINIMUM_VARIABLE: str(self.minimum_bytes),
            OVERHEAD_VARIABLE: str(self.overhead_bytes),
        }


def usual_minimum(device_kind: Backend) -> int:
    """Return a device's own minimum, in bytes."""
    return METAL_MINIMUM_BYTES if device_kind == "metal" else MINIMUM_BYTES


def variable_bytes(environ: Mapping[str, str], variable: str) -> int | None:
    """Return the size in an environment variable, in bytes; None if unset or empty.

    Raises:
        VariableError: The value is not a size.
    """
    text = environ.get(variable, "").strip()
    if not text:
        return None
    try:
        return parse_bytes(text)
    except ValueError:
        raise VariableError(variable, text) from None
