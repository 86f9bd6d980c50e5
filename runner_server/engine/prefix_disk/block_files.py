"""Files of the prefix cache on disk, one for each block.

A file is a header and a payload. The reader knows the size of the payload, and allocates no memory
by the header of a file. Files are written beside their final name and renamed, so that a reader
sees all of a file or none. They are not flushed to the device: after a power failure a file may be
incomplete, which its checksum reveals, and then its tokens are evaluated again.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import struct
import zlib
from pathlib import Path

FORMAT_VERSION = 1
"""Version of the files' format. Part of the names as well, so that other versions are not found."""

_MAGIC = b"MLXRUNKV"
_HEADER = struct.Struct("<8sI4xQ16sI")
"""Magic, version, size of the payload, name, checksum of the payload."""
_CHECKSUM = struct.Struct("<I")
"""Checksum of the header."""

HEADER_BYTES = _HEADER.size + _CHECKSUM.size

BLOCK_FILE = re.compile(r"([0-9a-f]{32})\.kv")
TEMPORARY_FILE = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{16}\.tmp")


class DamagedBlockError(Exception):
    """Incomplete, damaged or foreign content of a file."""


def block_path(directory: Path, name: str) -> Path:
    """Return the path of a block."""
    return directory / f"{name}.kv"


def write_block(directory: Path, name: str, payload: bytes) -> None:
    """Write a block atomically, readable by this user only.

    Raises:
        OSError: The block cannot be written; nothing is left of it.
    """
    temporary = directory / f"{name}.{secrets.token_hex(8)}.tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    number = os.open(temporary, flags, 0o600)
    try:
        # Whatever the umask.
        os.fchmod(number, 0o600)
        _write_all(number, _header(name, payload))
        _write_all(number, payload)
        temporary.replace(block_path(directory, name))
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(number)


def read_block(directory: Path, name: str, payload_bytes: int) -> bytearray:
    """Read a block.

    Raises:
        DamagedBlockError: The file is not that block, or is incomplete or damaged.
        OSError: The file cannot be read, or does not exist.
    """
    # Not blocked by a pipe with that name.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    path = block_path(directory, name)
    try:
        number = os.open(path, flags)
    except OSError as error:
        if path.is_symlink():
            raise DamagedBlockError("it is a link") from error
        raise
    try:
        status = os.fstat(number)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise DamagedBlockError("it is not a file of this user")
        if status.st_size != HEADER_BYTES + payload_bytes:
            raise DamagedBlockError(f"it has {status.st_size} bytes")
        header = _read_all(number, HEADER_BYTES)
        payload = _read_all(number, payload_bytes)
        if header != _header(name, payload):
            raise DamagedBlockError("its checksum does not fit its content")
    finally:
        os.close(number)
    return payload


def _header(name: str, payload: bytes | bytearray) -> bytes:
    fields = (_MAGIC, FORMAT_VERSION, len(payload), bytes.fromhex(name), zlib.crc32(payload))
    header = _HEADER.pack(*fields)
    return header + _CHECKSUM.pack(zlib.crc32(header))


def _write_all(number: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(number, view) :]


def _read_all(number: int, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = os.readv(number, [view])
        if not count:
            raise DamagedBlockError("it ends too early")
        view = view[count:]
    return data
