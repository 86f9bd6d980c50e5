"""Sampling of runners from outside: ``python -m soak.pool.watch PID FILE``.

A process of its own: the samples do not depend on the event loop of the pools, which may be busy.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from bench.children import children, every
from soak.paths import ROOT
from soak.pool.records import STOPPING, UNKNOWN, PoolSample

INTERVAL_SECONDS = 0.25


@asynccontextmanager
async def watching(path: Path) -> AsyncIterator[None]:
    """Sample this process and its runners during the block.

    Args:
        path: File that receives the samples.
    """
    command = [sys.executable, "-m", "soak.pool.watch", str(os.getpid()), str(path)]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        if process.stdout:
            await process.stdout.readline()
        yield
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


def read(
    path: Path,
    begin: float,
    end: float,
    models: Mapping[int, str],
    stops: Mapping[int, float],
) -> list[PoolSample]:
    """Read the samples of a time span.

    Args:
        path: File with the samples.
        begin: Start of the span, in ``time.monotonic()`` seconds, which all processes share.
        end: End of the span.
        models: Model of each runner by process id.
        stops: Time at which the stop of a runner began, by process id.
    """
    samples = []
    # The last line may be incomplete.
    for line in path.read_text(encoding="utf-8").splitlines()[:-1]:
        row = json.loads(line)
        if begin <= row["time"] <= end:
            samples.append(_sample(row, begin, models, stops))
    return samples


def _sample(
    row: Mapping[str, Any], begin: float, models: Mapping[int, str], stops: Mapping[int, float]
) -> PoolSample:
    def name(pid: int) -> str:
        is_stopping = row["time"] >= stops.get(pid, math.inf)
        return STOPPING if is_stopping else models.get(pid, UNKNOWN)

    return PoolSample(
        seconds=round(row["time"] - begin, 3),
        runners=tuple((name(pid), rss) for pid, rss, _ in row["runners"]),
        pss_bytes=sum(pss for _, _, pss in row["runners"]),
        descriptors=row["descriptors"],
        threads=row["threads"],
        rss_bytes=row["rss"],
        zombies=tuple(row["zombies"]),
    )


def runners(parent: psutil.Process) -> list[tuple[int, int, int]]:
    """Return process id, resident and proportional set of each runner of a process."""
    found = children(parent, lambda process: "runner_server" in process.cmdline(), recursive=False)
    return [(child.pid, child.rss_bytes, child.pss_bytes) for child in found]


def zombies(parent: psutil.Process) -> list[int]:
    """Return the children of a process that have exited and are not reaped."""
    return list(_zombies(parent))


def _zombies(parent: psutil.Process) -> Iterator[int]:
    for child in parent.children():
        with suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                yield child.pid


def main() -> None:
    """Write samples to a file until the process is gone; print a line when ready."""
    parent = psutil.Process(int(sys.argv[1]))
    with Path(sys.argv[2]).open("w", encoding="utf-8") as file, suppress(psutil.NoSuchProcess):
        sys.stdout.write("sampling\n")
        sys.stdout.flush()
        for now in every(INTERVAL_SECONDS):
            sample = {
                "time": now,
                "runners": runners(parent),
                "zombies": zombies(parent),
                "descriptors": parent.num_fds(),
                "threads": parent.num_threads(),
                "rss": parent.memory_info().rss,
            }
            file.write(json.dumps(sample) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
