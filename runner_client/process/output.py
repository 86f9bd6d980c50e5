"""Output of a child: split into lines and forwarded, with the last lines kept."""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_READ_BYTES = 64 * 1024
_LINE_BYTES = 4096
_TAIL_LINES = 50
_TAIL_BYTES = 16 * 1024


class LineSplitter:
    """Splitter of bytes into lines. Drops the bytes of a line beyond 4 KiB."""

    def __init__(self) -> None:
        self._line = bytearray()

    def feed(self, data: bytes) -> list[str]:
        """Add bytes and return the completed lines."""
        *ended, rest = data.split(b"\n")
        lines = []
        for part in ended:
            self._append(part)
            lines.append(self._take())
        self._append(rest)
        return lines

    def flush(self) -> list[str]:
        """Return the unterminated last line, if any."""
        return [self._take()] if self._line else []

    def _append(self, part: bytes) -> None:
        self._line += part[: _LINE_BYTES - len(self._line)]

    def _take(self) -> str:
        line = self._line.decode(errors="replace").rstrip("\r")
        self._line.clear()
        return line


class Tail:
    """Buffer of the last lines: at most 50, together at most 16 Ki characters. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=_TAIL_LINES)

    def append(self, line: str) -> None:
        """Append a line."""
        with self._lock:
            self._lines.append(line)
            while sum(map(len, self._lines)) > _TAIL_BYTES:
                self._lines.popleft()

    def lines(self) -> tuple[str, ...]:
        """Return the kept lines, oldest first."""
        with self._lock:
            return tuple(self._lines)


def drain(stream: IO[bytes], on_line: Callable[[str], None], name: str) -> threading.Thread:
    """Read a pipe to the end in a new thread, then close the pipe.

    A full pipe blocks its writer: after 64 KiB, or 16 KiB on macOS.

    Args:
        stream: The pipe, unbuffered.
        on_line: Called with each line, on the thread.
        name: The name of the thread.
    """
    thread = threading.Thread(target=_read_all, args=(stream, on_line), name=name, daemon=True)
    thread.start()
    return thread


def _read_all(stream: IO[bytes], on_line: Callable[[str], None]) -> None:
    splitter = LineSplitter()
    with stream:
        while data := os.read(stream.fileno(), _READ_BYTES):
            for line in splitter.feed(data):
                on_line(line)
    for line in splitter.flush():
        on_line(line)
