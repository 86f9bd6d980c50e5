"""Reservations made by the test, and by child processes on the same book."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runner_common.memory.reservations import Reservation, ReservationBook

PATHS = {"PYTHONPATH": os.pathsep.join(map(str, sys.path))}

RESERVE = """
import sys
from pathlib import Path
from runner_common.memory.reservations import ReservationBook

with ReservationBook(Path(sys.argv[1])).locked() as view:
    reservation = view.add(int(sys.argv[2]), "some/model")
print("ready", flush=True)
sys.stdin.readline()
"""
"""Script for reserving memory in the directory of the first argument until a line is read."""


def add_reservation(book: ReservationBook, size: int, pid: int | None = None) -> Reservation:
    """Reserve ``size`` bytes."""
    with book.locked() as view:
        return view.add(size, "some/model", pid)


def claimed_bytes(book: ReservationBook, exclude: tuple[int, ...] = ()) -> int:
    """Return the bytes which other runners may still take."""
    with book.locked() as view:
        return view.claimed_bytes(exclude)


def record_files(book: ReservationBook) -> list[Path]:
    """Return the record files of a book, sorted by name."""
    return sorted(book.directory.glob("*.json"))


@contextmanager
def run_script(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run code in a child process, killed at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | PATHS,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_line(process: subprocess.Popen[str]) -> str:
    """Read the next line printed by a process."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def send_line(process: subprocess.Popen[str]) -> None:
    """Send an empty line to a process."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
