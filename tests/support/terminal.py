"""A command in a terminal of its own, as a user sees and drives it."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import psutil

from support.fake_child import wait_until

_TAKE_TERMINAL = """
import fcntl, os, sys, termios

fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Makes the terminal the one whose keys send signals to the command."""

_INTERRUPT, END = "\x03", "\x04"
"""What the keys Ctrl-C and Ctrl-D send."""


class Terminal:
    """The user's side of a terminal.

    Args:
        process: The command.
        descriptor: The terminal, seen from outside.
    """

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self._descriptor = descriptor
        self._seen = b""

    def read_until(self, text: str) -> str:
        """Return what was shown since the last call, up to and with a text.

        Raises:
            AssertionError: The command ended first.
        """
        wanted = text.encode()
        while wanted not in self._seen:
            more = self._read()
            assert more, f"the command ended before {text!r}: {self._seen.decode()!r}"
            self._seen += more
        shown, found, self._seen = self._seen.partition(wanted)
        return (shown + found).decode()

    def read_to_end(self) -> str:
        """Return what is shown from now on until the command ends."""
        while more := self._read():
            self._seen += more
        shown, self._seen = self._seen, b""
        return shown.decode()

    def send(self, text: str) -> Self:
        """Type a text."""
        os.write(self._descriptor, text.encode())
        return self

    def interrupt(self) -> Self:
        """Press Ctrl-C once the command waits.

        Python's ``readline`` notices a signal while it waits for a key, or else at the next key: a
        signal that comes between its showing one character and its waiting for the next is noticed
        late. No user types that fast.
        """
        waiting = psutil.Process(self.process.pid)
        wait_until(lambda: waiting.status() == psutil.STATUS_SLEEPING)
        return self.send(_INTERRUPT)

    def _read(self) -> bytes:
        try:
            return os.read(self._descriptor, 65_536)
        except OSError:
            # How Linux tells that the command was the last to close the terminal.
            return b""


@contextmanager
def in_terminal(command: Sequence[str]) -> Iterator[Terminal]:
    """Run a command in a terminal; it is killed after the block if it has not ended."""
    outside, inside = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", _TAKE_TERMINAL, *command],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        start_new_session=True,
    ) as process:
        os.close(inside)
        try:
            yield Terminal(process, outside)
        finally:
            process.kill()
            os.close(outside)
