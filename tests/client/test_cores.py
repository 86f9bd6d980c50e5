"""The number of cores for a process: CPU affinity and the quotas of control groups."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner_client.host.blas import Blas, in_front
from runner_client.host.blas_choice import Choice, recall, remember
from runner_client.host.doctor import examine
from runner_common.cores import Cores, usable_cores
from support.control_group import cpu_group, needs_cpu_group

V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture(autouse=True)
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the scheduler offer eight cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)


def write_files(root: Path, files: dict[str, str]) -> None:
    """Write files below a root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def write_v1_quotas(root: Path, **quotas: int) -> None:
    """Write quotas of version 1 by group path, with ``__`` for the slash."""
    write_files(
        root, {"proc/self/cgroup": "2:cpu,cpuacct:/job/own\n", "proc/self/mountinfo": V1_MOUNT}
    )
    for name, quota in quotas.items():
        folder = f"sys/fs/cgroup/cpu,cpuacct/{name.replace('__', '/')}"
        write_files(root, {f"{folder}/cpu.cfs_quota_us": f"{quota}\n"})
        write_files(root, {f"{folder}/cpu.cfs_period_us": "100000\n"})


def write_v2_quotas(root: Path, **limits: str) -> None:
    """Write quotas of version 2 by group path, with ``__`` for the slash."""
    write_files(root, {"proc/self/cgroup": "0::/job/own\n", "proc/self/mountinfo": V2_MOUNT})
    for name, limit in limits.items():
        write_files(root, {f"sys/fs/cgroup/{name.replace('__', '/')}/cpu.max": f"{limit}\n"})


def test_without_control_groups_the_affinity_counts(tmp_path: Path) -> None:
    assert usable_cores(tmp_path) == Cores(8, 8)


def test_without_affinity_all_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS ``sched_getaffinity`` does not exist."""
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert usable_cores(tmp_path) == Cores(3, 3)


@pytest.mark.parametrize(
    ("limit", "count"),
    [
        ("100000 100000", 1),
        ("150000 100000", 2),
        ("10000 100000", 1),
        ("200000 50000", 4),
        ("900000 100000", 8),
        ("max 100000", 8),
        ("", 8),
        ("nonsense", 8),
        ("100000 0", 8),
    ],
)
def test_quotas_of_version_2_limit_the_cores(tmp_path: Path, limit: str, count: int) -> None:
    write_v2_quotas(tmp_path, job__own=limit)
    assert usable_cores(tmp_path).count == count


@pytest.mark.parametrize(("quota", "count"), [(100_000, 1), (250_000, 3), (-1, 8), (900_000, 8)])
def test_quotas_of_version_1_limit_the_cores(tmp_path: Path, quota: int, count: int) -> None:
    write_v1_quotas(tmp_path, job__own=quota)
    assert usable_cores(tmp_path).count == count


def test_the_group_with_the_smallest_quota_is_named(tmp_path: Path) -> None:
    write_v2_quotas(tmp_path, job__own="400000 100000", job="200000 100000")
    assert usable_cores(tmp_path) == Cores(2, 8, str(tmp_path / "sys/fs/cgroup/job"))
    write_v1_quotas(tmp_path, job__own=-1, job=300_000)
    assert usable_cores(tmp_path) == Cores(3, 8, str(tmp_path / "sys/fs/cgroup/cpu,cpuacct/job"))


@needs_cpu_group
def test_a_real_quota_limits_the_cores() -> None:
    code = "from runner_common.cores import usable_cores; print(usable_cores())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with cpu_group(0.5) as group:
        command = group.command(sys.executable, "-c", code)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Cores(count=1,")


def patch_cores(monkeypatch: pytest.MonkeyPatch, cores: Cores) -> None:
    """Patch the number of cores found by the client."""
    for module in ("blas", "blas_choice", "doctor"):
        monkeypatch.setattr(f"runner_client.host.{module}.usable_cores", lambda: cores)


def test_mkl_threads_stay_within_a_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    mkl = Blas("MKL", Path("/opt/libmkl_rt.so.3"))
    patch_cores(monkeypatch, Cores(2, 8, "/group"))
    assert in_front({}, mkl)["OMP_NUM_THREADS"] == "2"
    assert in_front({"OMP_NUM_THREADS": "5"}, mkl)["OMP_NUM_THREADS"] == "5"
    # The runner sets OpenBLAS's threads for each model, unless the environment already has.
    assert "OMP_NUM_THREADS" not in in_front({}, Blas("OpenBLAS", Path("/libopenblas.so.0")))
    patch_cores(monkeypatch, Cores(8, 8))
    assert "OMP_NUM_THREADS" not in in_front({}, mkl)


def test_a_choice_measured_with_other_cores_is_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    patch_cores(monkeypatch, Cores(8, 8))
    remember(environment, Choice(None), (), root=tmp_path)
    assert recall(environment, (), root=tmp_path) == Choice(None)
    patch_cores(monkeypatch, Cores(1, 8, "/group"))
    assert recall(environment, (), root=tmp_path) is None


def test_doctor_names_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_cores(monkeypatch, Cores(1, 8, "/sys/fs/cgroup/docker/1"))
    findings = {finding.name: finding for finding in examine(version=lambda _: None)}
    value = findings["processor cores"].value
    assert value == "1 of 8, limited by the CPU quota of /sys/fs/cgroup/docker/1"
