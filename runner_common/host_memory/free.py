"""How much memory a model may take now: the smallest of all limits that apply.

The client's gate asks before it spawns a runner, the runner asks again before
it loads. Reads files and asks the system's own tools; never imports MLX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from runner_common.host_memory.cgroup import GroupLimit, cgroup_limits, is_in_group
from runner_common.host_memory.devices import (
    Backend,
    DeviceInfo,
    Host,
    device_infos,
    installed_backend,
)

__all__ = [
    "Backend",
    "DeviceInfo",
    "FreeMemory",
    "GroupLimit",
    "Host",
    "MemoryLimit",
    "Source",
    "device_infos",
    "free_memory",
    "installed_backend",
    "is_in_group",
]

Source = Literal["system", "cgroup", "device"]


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """One of the limits that free memory is the smallest of.

    Attributes:
        source: What limits.
        available_bytes: What it still allows.
        group: The control group's directory, for one of those.
        device: The GPU with memory of its own, for one of those.
    """

    source: Source
    available_bytes: int
    group: str = ""
    device: str = ""


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Free memory at one moment, and what limits it.

    Attributes:
        available_bytes: The smallest of the three figures below.
        source: Which of them that is.
        system_bytes: What the operating system says is available without swapping.
        cgroup_bytes: What the control groups of this process still allow (Linux);
            None where none limits it.
        device_bytes: What the first device still allows: free memory of a CUDA
            device, the working-set limit on macOS; None on the CPU, or where it
            cannot be told.
        device_name: Name of the first device.
        device_kind: ``"metal"``, ``"cuda"`` or ``"cpu"``.
        reason: Why ``device_bytes`` is None although there is a device, or an
            empty string.
        device_id: What tells the first device from others of the same name; empty where
            its memory is the system's, or cannot be told.
        groups: What each control group still allows; ``cgroup_bytes`` is the smallest.
    """

    available_bytes: int
    source: Source
    system_bytes: int
    cgroup_bytes: int | None
    device_bytes: int | None
    device_name: str
    device_kind: Backend
    reason: str = ""
    device_id: str = ""
    groups: tuple[GroupLimit, ...] = ()

    @property
    def limits(self) -> tuple[MemoryLimit, ...]:
        """All limits; ``available_bytes`` is the smallest of theirs."""
        limits = [MemoryLimit("system", self.system_bytes)]
        limits += (
            MemoryLimit("cgroup", group.available_bytes, group=group.path) for group in self.groups
        )
        if self.cgroup_bytes is not None and not self.groups:
            limits.append(MemoryLimit("cgroup", self.cgroup_bytes))
        if self.device_bytes is not None:
            limits.append(MemoryLimit("device", self.device_bytes, device=self.device_id))
        return tuple(limits)


def free_memory(host: Host | None = None) -> FreeMemory:
    """Measure the memory free for a model now.

    Only the first device counts: a runner uses one. On macOS and on the CPU the
    weights live in the system's memory; on CUDA they also pass through it while
    they load, so that the system's figure limits there too.

    Never raises for a tool or file that is missing: that figure is None.

    Args:
        host: Where facts come from; this machine by default.
    """
    host = host or Host()
    device = device_infos(host)[0]
    _, system_bytes = host.memory()
    groups = cgroup_limits(host.root)
    cgroup_bytes = min((group.available_bytes for group in groups), default=None)
    device_bytes = None if device.kind == "cpu" else device.free_bytes
    figures: list[tuple[int, Source]] = [(system_bytes, "system")]
    if cgroup_bytes is not None:
        figures.append((cgroup_bytes, "cgroup"))
    if device_bytes is not None:
        figures.append((device_bytes, "device"))
    available_bytes, source = min(figures, key=lambda figure: figure[0])
    return FreeMemory(
        available_bytes=available_bytes,
        source=source,
        system_bytes=system_bytes,
        cgroup_bytes=cgroup_bytes,
        device_bytes=device_bytes,
        device_name=device.name,
        device_kind=device.kind,
        reason=device.reason,
        device_id=device.device_id if device_bytes is not None else "",
        groups=groups,
    )
