"""Processes of their own that share a book of reservations with the test."""

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
"""Sets memory aside in the directory of its first argument until it reads a line."""


def add(book: ReservationBook, size: int, pid: int | None = None) -> Reservation:
    """Sets memory aside."""
    with book.locked() as view:
        return view.add(size, "some/model", pid)


def claimed(book: ReservationBook, exclude: tuple[int, ...] = ()) -> int:
    """What all others may still take."""
    with book.locked() as view:
        return view.claimed_bytes(exclude)


def files(book: ReservationBook) -> list[Path]:
    """The records that are written down."""
    return sorted(book.directory.glob("*.json"))


@contextmanager
def script(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Runs code in another process, which is gone afterwards."""
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


def line_of(process: subprocess.Popen[str]) -> str:
    """The next line that the process prints."""
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    """Sends the process a line."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
