"""Free memory: the minimum of system, control groups and device."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from runner_common.host_memory.cgroup import (
    GroupLimit,
    cgroup_limits,
    is_in_group,
)
from runner_common.host_memory.devices import default_working_set_bytes, run_command
from runner_common.host_memory.free import (
    Host,
    MemoryLimit,
    device_infos,
    free_memory,
    installed_backend,
)

MIB = 1024**2
GIB = 1024**3


def cgroup_available_bytes(root: Path) -> int | None:
    return min((limit.available_bytes for limit in cgroup_limits(root)), default=None)


V1_MOUNT = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V2_MOUNT = "30 23 0:26 {root} /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
NO_LIMIT = str(2**63 - 4096)


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def v2_group(path: str, limit: str, usage: int, **statistics: int) -> dict[str, str]:
    folder = f"sys/fs/cgroup{path}"
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": lines_of({"anon": 1, "shmem": 7, **statistics}),
    }


def v1_group(path: str, limit: str, usage: int, **statistics: int) -> dict[str, str]:
    """Return the files of a group with 3 and 5 bytes of cached files, without child groups."""
    folder = f"sys/fs/cgroup/memory{path}"
    own = {"inactive_file": 3, "active_file": 5}
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.stat": lines_of({**own, **statistics}),
    }


def lines_of(statistics: dict[str, int]) -> str:
    return "".join(f"{name} {value}\n" for name, value in statistics.items())


def process_in(group: str, mounts: str) -> dict[str, str]:
    return {"proc/self/cgroup": group, "proc/self/mountinfo": mounts}


def test_v2_takes_the_tightest_ancestor(tmp_path: Path) -> None:
    write_files(tmp_path, process_in("0::/user/job\n", V2_MOUNT.format(root="/")))
    write_files(tmp_path, v2_group("/user/job", "max", 300))
    write_files(tmp_path, v2_group("/user", "1000", 600))
    assert cgroup_available_bytes(tmp_path) == 400


@pytest.mark.parametrize(
    ("statistics", "available"),
    [
        ({"inactive_file": 700}, 800),
        # A file read twice.
        ({"active_file": 700}, 800),
        ({"inactive_file": 300, "active_file": 400, "file_mapped": 50}, 750),
        # Shared memory, which is mapped but is not a file.
        ({"inactive_file": 10, "file_mapped": 600}, 100),
        ({"slab_reclaimable": 200, "slab_unreclaimable": 90}, 300),
        ({"inactive_file": 10, "file_mapped": 600, "slab_reclaimable": 200}, 300),
        ({"inactive_file": 5000}, 1000),
    ],
)
def test_v2_reclaimable_pages_are_free(
    tmp_path: Path, statistics: dict[str, int], available: int
) -> None:
    write_files(tmp_path, process_in("0::/job\n", V2_MOUNT.format(root="/")))
    write_files(tmp_path, v2_group("/job", "1000", 900, **statistics))
    assert cgroup_available_bytes(tmp_path) == available


@pytest.mark.parametrize(
    ("statistics", "available"),
    [
        ({"total_inactive_file": 700}, 800),
        ({"total_active_file": 700}, 800),
        (
            {"total_inactive_file": 300, "total_active_file": 400, "total_mapped_file": 50},
            750,
        ),
        ({"total_inactive_file": 10, "total_mapped_file": 600}, 100),
        # Without the prefix, the figure excludes child groups and does not count.
        ({"mapped_file": 600, "total_active_file": 100}, 200),
    ],
)
def test_v1_reclaimable_pages_are_free(
    tmp_path: Path, statistics: dict[str, int], available: int
) -> None:
    write_files(tmp_path, process_in("4:memory:/job\n", V1_MOUNT.format(root="/")))
    write_files(tmp_path, v1_group("/job", "1000", 900, **statistics))
    assert cgroup_available_bytes(tmp_path) == available


def test_v2_memory_high_counts_as_a_limit(tmp_path: Path) -> None:
    write_files(tmp_path, process_in("0::/job\n", V2_MOUNT.format(root="/")))
    write_files(tmp_path, v2_group("/job", "1000", 100))
    write_files(tmp_path, {"sys/fs/cgroup/job/memory.high": "500\n"})
    assert cgroup_available_bytes(tmp_path) == 400


def test_v1_takes_the_tightest_ancestor(tmp_path: Path) -> None:
    write_files(tmp_path, process_in("4:memory:/docker/abc\n1:cpu:/x\n", V1_MOUNT.format(root="/")))
    write_files(tmp_path, v1_group("/docker/abc", "2000", 500, total_inactive_file=100))
    write_files(tmp_path, v1_group("/docker", NO_LIMIT, 5000))
    write_files(tmp_path, v1_group("", "9000", 8000))
    assert cgroup_available_bytes(tmp_path) == 1000


def test_a_huge_v1_limit_is_not_a_limit(tmp_path: Path) -> None:
    write_files(tmp_path, process_in("4:memory:/a\n", V1_MOUNT.format(root="/")))
    write_files(tmp_path, v1_group("/a", NO_LIMIT, 500))
    assert cgroup_available_bytes(tmp_path) is None


def test_a_group_with_the_hosts_path_is_the_mount_point(tmp_path: Path) -> None:
    write_files(tmp_path, process_in("4:memory:/docker/abc\n", V1_MOUNT.format(root="/docker/abc")))
    write_files(tmp_path, v1_group("", "2000", 500))
    assert cgroup_available_bytes(tmp_path) == 1500


def test_a_group_outside_the_namespace_is_the_mount_point(tmp_path: Path) -> None:
    write_files(tmp_path, process_in("0::/../other\n", V2_MOUNT.format(root="/")))
    write_files(tmp_path, v2_group("", "2000", 500))
    assert cgroup_available_bytes(tmp_path) == 1500


def test_each_group_with_a_limit_is_returned(tmp_path: Path) -> None:
    write_files(tmp_path, process_in("0::/user/job\n", V2_MOUNT.format(root="/")))
    write_files(tmp_path, v2_group("/user/job", "1000", 300))
    write_files(tmp_path, v2_group("/user", "2000", 600))
    write_files(tmp_path, v2_group("", "max", 600))
    folder = tmp_path / "sys/fs/cgroup"
    assert cgroup_limits(tmp_path) == (
        GroupLimit(f"{folder}/user/job", 700),
        GroupLimit(f"{folder}/user", 1400),
    )


def test_a_process_is_in_its_group_and_all_parents(tmp_path: Path) -> None:
    write_files(tmp_path, process_in("0::/user/job\n", V2_MOUNT.format(root="/")))
    write_files(tmp_path, {"proc/7/cgroup": "0::/user/other\n"})
    folder = tmp_path / "sys/fs/cgroup"
    assert is_in_group(7, f"{folder}/user", tmp_path)
    assert not is_in_group(7, f"{folder}/user/job", tmp_path)
    # A process that has ended, or cannot be inspected, counts as a member.
    assert is_in_group(8, f"{folder}/user/job", tmp_path)


def test_a_hybrid_mount_uses_the_hierarchy_with_the_memory_controller(tmp_path: Path) -> None:
    unified = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    write_files(tmp_path, process_in("4:memory:/a\n0::/a\n", V1_MOUNT.format(root="/") + unified))
    write_files(tmp_path, v1_group("/a", "2000", 500))
    write_files(tmp_path, {"sys/fs/cgroup/unified/a/cgroup.procs": "1\n"})
    assert cgroup_available_bytes(tmp_path) == 1500


def test_a_usage_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    write_files(tmp_path, process_in("0::/job\n", V2_MOUNT.format(root="/")))
    write_files(tmp_path, v2_group("/job", "1000", 1200))
    assert cgroup_available_bytes(tmp_path) == 0


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"proc/self/cgroup": "0::/job\n"},
        {"proc/self/cgroup": "nonsense\n", "proc/self/mountinfo": "x - y\n\n1 2 3\n"},
        {**process_in("0::/job\n", V2_MOUNT.format(root="/")), "sys/fs/cgroup/job/memory.max": "5"},
        {
            **process_in("0::/job\n", V2_MOUNT.format(root="/")),
            **v2_group("/job", "what", 5),
        },
    ],
)
def test_missing_and_invalid_files_are_not_a_limit(tmp_path: Path, files: dict[str, str]) -> None:
    write_files(tmp_path, files)
    assert cgroup_available_bytes(tmp_path) is None


def answering(answers: dict[str, str]) -> Callable[[Sequence[str]], str]:
    """Return a command runner with these answers, by command name or last argument."""

    def run(command: Sequence[str]) -> str:
        for key in (command[-1], command[0]):
            if key in answers:
                return answers[key]
        raise FileNotFoundError(command[0])

    return run


def host(tmp_path: Path, **overrides: object) -> Host:
    values: dict[str, object] = {
        "root": tmp_path,
        "system": "linux",
        "machine": "x86_64",
        "environ": {},
        "run": answering({}),
        "installed": lambda _name: False,
        "memory": lambda: (64 * GIB, 40 * GIB),
    }
    return Host(**{**values, **overrides})  # type: ignore[arg-type]  # checked by its use


def cuda_host(tmp_path: Path, output: str, **overrides: object) -> Host:
    overrides = {"installed": lambda name: name == "mlx-cuda-13", **overrides}
    return host(tmp_path, run=answering({"nvidia-smi": output}), **overrides)


TWO_GPUS = "0, GPU-aaaa, 20000, 24576, NVIDIA A\n1, GPU-bbbb, 70000, 81559, NVIDIA B, 80GB\n"


def test_a_cpu_has_the_systems_memory(tmp_path: Path) -> None:
    write_files(tmp_path, {"proc/cpuinfo": "processor : 0\nmodel name : Some CPU\n"})
    free = free_memory(host(tmp_path))
    assert (free.available_bytes, free.source, free.device_kind) == (40 * GIB, "system", "cpu")
    assert (free.cgroup_bytes, free.device_bytes) == (None, None)
    assert free.device_name == "Some CPU"


def test_a_control_group_binds_if_it_is_the_smallest(tmp_path: Path) -> None:
    write_files(tmp_path, process_in("0::/job\n", V2_MOUNT.format(root="/")))
    write_files(tmp_path, v2_group("/job", str(8 * GIB), 2 * GIB))
    free = free_memory(host(tmp_path))
    assert (free.available_bytes, free.source) == (6 * GIB, "cgroup")
    assert free.system_bytes == 40 * GIB
    assert [limit.source for limit in free.limits] == ["system", "cgroup"]
    assert min(limit.available_bytes for limit in free.limits) == free.available_bytes


def test_the_first_cuda_device_binds_if_it_is_the_smallest(tmp_path: Path) -> None:
    free = free_memory(cuda_host(tmp_path, TWO_GPUS))
    assert (free.available_bytes, free.source) == (20000 * MIB, "device")
    assert (free.device_name, free.device_kind) == ("NVIDIA A", "cuda")
    assert free.device_id == "GPU-aaaa"
    assert free.limits[-1] == MemoryLimit("device", 20000 * MIB, device="GPU-aaaa")


def test_a_cuda_device_may_have_a_comma_in_its_name(tmp_path: Path) -> None:
    first, second = device_infos(cuda_host(tmp_path, TWO_GPUS))
    assert (first.free_bytes, first.total_bytes) == (20000 * MIB, 24576 * MIB)
    assert second.name == "NVIDIA B, 80GB"


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1", ["NVIDIA B, 80GB"]),
        ("1,0", ["NVIDIA B, 80GB", "NVIDIA A"]),
        ("GPU-bb", ["NVIDIA B, 80GB"]),
        ("0,9,1", ["NVIDIA A"]),
        ("", ["unknown"]),
        ("-1", ["unknown"]),
    ],
)
def test_cuda_visible_devices_selects_the_devices(
    tmp_path: Path, visible: str, names: list[str]
) -> None:
    infos = device_infos(
        cuda_host(tmp_path, TWO_GPUS, environ={"CUDA_VISIBLE_DEVICES": visible}),
    )
    assert [info.name for info in infos] == names


def test_a_figure_that_nvidia_smi_withholds_is_unknown(tmp_path: Path) -> None:
    (info,) = device_infos(cuda_host(tmp_path, "0, GPU-a, [N/A], 24576, NVIDIA A\n"))
    assert (info.free_bytes, info.total_bytes) == (None, 24576 * MIB)
    assert "[N/A]" in info.reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (FileNotFoundError("nvidia-smi"), "not installed"),
        (subprocess.TimeoutExpired("nvidia-smi", 5), "did not answer"),
        (subprocess.CalledProcessError(9, "nvidia-smi"), "exit status 9"),
        (PermissionError("no"), "failed"),
    ],
)
def test_a_failing_tool_gives_an_unknown_figure_with_a_reason(
    tmp_path: Path, error: Exception, reason: str
) -> None:
    def run(_command: Sequence[str]) -> str:
        raise error

    free = free_memory(host(tmp_path, run=run, installed=lambda _name: True))
    assert (free.device_bytes, free.source, free.device_kind) == (None, "system", "cuda")
    assert free.device_id == ""
    assert reason in free.reason


def mac_host(tmp_path: Path, limit: str, total: int) -> Host:
    answers = {"iogpu.wired_limit_mb": limit, "machdep.cpu.brand_string": "Apple M2 Max\n"}
    return host(
        tmp_path,
        system="darwin",
        machine="arm64",
        run=answering(answers),
        memory=lambda: (total, total - GIB),
    )


def test_a_wired_limit_set_by_the_user_is_the_metal_limit(tmp_path: Path) -> None:
    free = free_memory(mac_host(tmp_path, "26624\n", 32 * GIB))
    assert (free.device_bytes, free.source) == (26624 * MIB, "device")
    assert (free.device_name, free.device_kind) == ("Apple M2 Max", "metal")


@pytest.mark.parametrize(
    ("total", "limit"),
    [(16 * GIB, 16 * GIB * 2 // 3), (32 * GIB, 32 * GIB * 2 // 3), (64 * GIB, 48 * GIB)],
)
def test_the_default_metal_limit_depends_on_the_memory(
    tmp_path: Path, total: int, limit: int
) -> None:
    assert free_memory(mac_host(tmp_path, "0\n", total)).device_bytes == limit


def test_the_default_metal_limits_match_reported_ones() -> None:
    # recommendedMaxWorkingSetSize, as printed by llama.cpp on these machines.
    assert default_working_set_bytes(8 * GIB) // MIB == 5461
    assert default_working_set_bytes(16 * GIB) // MIB == 10922
    assert default_working_set_bytes(32 * GIB) // MIB == 21845


def test_a_mac_without_sysctl_still_has_a_limit(tmp_path: Path) -> None:
    (info,) = device_infos(
        host(tmp_path, system="darwin", machine="arm64", memory=lambda: (16 * GIB, 9 * GIB))
    )
    assert info.free_bytes == 16 * GIB * 2 // 3
    assert "sysctl" in info.reason


@pytest.mark.parametrize(
    ("system", "machine", "packages", "backend"),
    [
        ("darwin", "arm64", (), "metal"),
        ("darwin", "x86_64", (), "cpu"),
        ("linux", "x86_64", ("mlx-cpu",), "cpu"),
        ("linux", "x86_64", ("mlx-cuda-12",), "cuda"),
        ("linux", "aarch64", ("mlx-cuda-13",), "cuda"),
    ],
)
def test_the_backend_depends_on_the_installed_packages(
    tmp_path: Path, system: str, machine: str, packages: tuple[str, ...], backend: str
) -> None:
    here = host(tmp_path, system=system, machine=machine, installed=lambda name: name in packages)
    assert installed_backend(here) == backend


def test_this_machine_has_memory() -> None:
    free = free_memory()
    assert 0 < free.available_bytes <= psutil.virtual_memory().total
    assert device_infos()[0].kind == free.device_kind


def test_a_failing_command_raises() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        run_command(["sh", "-c", "exit 3"])
    assert run_command(["echo", "hello"]) == "hello\n"
