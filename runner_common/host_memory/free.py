"""Memory available to a model at the moment: the smallest of several limits.

The client's gate measures it before it starts a runner, and the runner before a load. Measuring
reads files and runs tools of the system, and never imports MLX.
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
    """One of the limits on free memory.

    Attributes:
        source: Kind of the limit.
        available_bytes: Memory still available under the limit.
        group: Directory of the control group; empty for other kinds.
        device: Id of the discrete GPU; empty for other kinds.
    """

    source: Source
    available_bytes: int
    group: str = ""
    device: str = ""


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Free memory at one moment, with every limit.

    Attributes:
        available_bytes: The smallest of the figures of system, control groups and device.
        source: The kind of that figure.
        system_bytes: Memory available without swapping, according to the operating system.
        cgroup_bytes: Memory still available in the control groups of this process (Linux);
            None if none limits memory.
        device_bytes: Memory still available on the first device: free memory of a CUDA
            device, the working-set limit on macOS; None on the CPU or if unknown.
        device_name: Name of the first device.
        device_kind: ``"metal"``, ``"cuda"`` or ``"cpu"``.
        reason: Why ``device_bytes`` is None although there is a device; empty otherwise.
        device_id: Unique id of the first device; empty if it uses the system's memory or its
            free memory is unknown.
        groups: Memory still available in each control group; ``cgroup_bytes`` is the smallest.
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
        """Every limit; ``available_bytes`` is the smallest."""
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
    """Measure the memory available to a model.

    Only the first device counts, because a runner uses only one. The system's figure is a limit on
    every device: the weights are in the system's memory on macOS and on the CPU, and pass through
    it during a load on CUDA.

    Never raises for a missing tool or file; the figure is None then.

    Args:
        host: Sources of facts. Default: this machine.
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
