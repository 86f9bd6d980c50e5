"""Messages between the server and the process that renders chat templates.

A message is JSON, preceded by its length as eight bytes. JSON escapes nothing but what it must, and
lone surrogates, which a template can write, pass.
"""

from __future__ import annotations

import json
import struct
from typing import IO, Any

_LENGTH = struct.Struct(">Q")


def write_frame(sink: IO[bytes], message: dict[str, Any]) -> None:
    """Write a message.

    Raises:
        OSError: The other process is gone.
    """
    data = json.dumps(message, ensure_ascii=False).encode("utf-8", "surrogatepass")
    sink.write(_LENGTH.pack(len(data)) + data)
    sink.flush()


def read_frame(source: IO[bytes]) -> dict[str, Any] | None:
    """Read a message; None if the other process has closed its end."""
    head = source.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = source.read(length)
    if len(data) < length:
        return None
    message: dict[str, Any] = json.loads(data.decode("utf-8", "surrogatepass"))
    return message
