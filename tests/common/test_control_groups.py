"""Free memory in a real control group, where the machine allows one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.control_group import control_group, needs_control_group, write_uncached

MIB = 2**20

READ_TWICE = """
import mmap, sys
from runner_common.host_memory.free import free_memory

def tell():
    print(free_memory().cgroup_bytes, flush=True)

tell()
for _ in range(2):
    with open(sys.argv[1], "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
tell()
with open(sys.argv[1], "rb") as file:
    mapped = mmap.mmap(file.fileno(), 64 << 20, prot=mmap.PROT_READ)
    sum(mapped[at] for at in range(0, 64 << 20, 4096))
    tell()
"""


@pytest.mark.slow
@needs_control_group
def test_a_file_read_twice_counts_as_free_memory(tmp_path: Path) -> None:
    file = write_uncached(tmp_path / "weights", 200 * MIB)
    with control_group(300 * MIB) as group:
        command = group.command(sys.executable, "-c", READ_TWICE, str(file))
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert group.oom_kills == 0
        cached = sum(
            value
            for name, value in group.statistics().items()
            if name in ("total_active_file", "active_file")
        )
    before, after, mapped = map(int, done.stdout.split())
    # Most of the file is on the active list, of pages used more than once.
    assert cached > 150 * MIB
    assert after == pytest.approx(before, abs=8 * MIB)
    assert mapped == pytest.approx(after - 64 * MIB, abs=8 * MIB)
