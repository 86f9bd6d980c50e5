"""Memory that is kept free beside every runner, from the same variables on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner_common.host_memory.free import Backend

OVERHEAD_VARIABLE = "MLX_RUNNER_GPU_OVERHEAD"
"""Bytes to keep free beside the minimum, for other users of the device."""

MINIMUM_VARIABLE = "MLX_RUNNER_MEMORY_MINIMUM"
"""Bytes to keep free in place of the device's own minimum."""

METAL_MINIMUM_BYTES = 512 * 1024**2
"""Kept free on Metal for what no model's size tells: the figure of the original gate."""

MINIMUM_BYTES = 457 * 1024**2
"""The same on every other device."""


class VariableError(ValueError):
    """An environment variable is not a number of bytes.

    Attributes:
        variable: Its name.
    """

    def __init__(self, variable: str, value: str) -> None:
        super().__init__(
            f"{variable} is {value!r}; it must be a number of bytes, for instance "
            "1073741824 for 1 GiB"
        )
        self.variable = variable


@dataclass(frozen=True, slots=True)
class Headroom:
    """Memory that no runner may be promised.

    Attributes:
        minimum_bytes: For what no model's size tells.
        overhead_bytes: For other users of the device.
    """

    minimum_bytes: int
    overhead_bytes: int = 0

    @classmethod
    def from_environ(cls, environ: Mapping[str, str], device_kind: Backend) -> Headroom:
        """Read both figures from the environment; the minimum defaults to the device's.

        Raises:
            VariableError: A variable is not a number of bytes.
        """
        usual = METAL_MINIMUM_BYTES if device_kind == "metal" else MINIMUM_BYTES
        minimum = variable_bytes(environ, MINIMUM_VARIABLE)
        return cls(
            minimum_bytes=usual if minimum is None else minimum,
            overhead_bytes=variable_bytes(environ, OVERHEAD_VARIABLE) or 0,
        )

    @property
    def total_bytes(self) -> int:
        """Both figures together."""
        return self.minimum_bytes + self.overhead_bytes

    def variables(self) -> dict[str, str]:
        """Return the variables from which another process reads the same headroom."""
        return {
            MINIMUM_VARIABLE: str(self.minimum_bytes),
            OVERHEAD_VARIABLE: str(self.overhead_bytes),
        }


def variable_bytes(environ: Mapping[str, str], variable: str) -> int | None:
    """Return the bytes that a variable names; None where it is unset or empty.

    Raises:
        VariableError: It is not a number of bytes.
    """
    text = environ.get(variable, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS):
        raise VariableError(variable, text)
    return int(text)


_DIGITS = 30
"""Far beyond any memory; Python itself refuses to read a number of 5,000 digits."""
