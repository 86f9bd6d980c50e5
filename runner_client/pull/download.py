"""Transfer of one file, with resumption and a checksum."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from runner_client.pull.errors import PullError
from runner_client.pull.hub import InterruptedTransferError
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from hashlib import _Hash
    from pathlib import Path
    from typing import BinaryIO

    from runner_client.pull.files import RemoteFile
    from runner_client.pull.hub import Hub
    from runner_client.pull.store import Store

OnBytes = Callable[[int], None]
"""Function that is called with the number of bytes that a file gained, or lost if negative."""

_ATTEMPTS = 5
"""Attempts in a row that may bring no byte before a file is given up."""

PAUSE_SECONDS = 1.0
_HASHED_BYTES = 1 << 22


def fetch_into_store(
    hub: Hub, store: Store, file: RemoteFile, commit: str, on_bytes: OnBytes
) -> None:
    """Fetch the missing bytes of a file into the cache, and verify the whole file.

    Raises:
        PullError: The hub refused or failed, the disk is full, or the bytes are not those that
            the hub promises.
    """
    with store.locked(file):
        if store.has(file):
            if is_intact(file, store.blob(file)):
                return
            store.blob(file).unlink()
            on_bytes(-file.size)
        fetch(hub, file, commit, store.partial(file), on_bytes)
        store.complete(file)


def fetch(hub: Hub, file: RemoteFile, commit: str, path: Path, on_bytes: OnBytes) -> None:
    """Fetch the missing bytes of a file at a path, and verify the whole file.

    Raises:
        PullError: As for ``fetch_into_store``. The bytes stay at the path, unless they are wrong.
    """
    try:
        with path.open("a+b") as out:
            transfer = _Transfer(hub, file, commit, out, on_bytes)
            was_resumed = transfer.position > 0
            is_right = transfer.run()
            if not is_right and was_resumed:
                # The bytes of an earlier run may be the wrong ones.
                transfer.restart()
                is_right = transfer.run()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise PullError(
            f"the disk of {path.parent} is full: free up to {format_bytes(file.size)} for "
            f"{file.name}, and pull again, which continues where this ended"
        ) from error
    if not is_right:
        path.unlink()
        raise PullError(
            f"{file.name} is damaged: its bytes do not have the checksum {file.digest} that the "
            "hub gives; they were removed, so pull again"
        )


class _Transfer:
    """Transfer of one file into an open one, hashed on the way.

    Attributes:
        position: Number of bytes that the open file has.
    """

    def __init__(
        self, hub: Hub, file: RemoteFile, commit: str, out: BinaryIO, on_bytes: OnBytes
    ) -> None:
        self._hub = hub
        self._file = file
        self._commit = commit
        self._out = out
        self._on_bytes = on_bytes
        self._hash = file.hasher()
        self.position = _hash_rest(out, self._hash)
        if self.position > file.size:
            self._out.truncate(0)
            self._hash, self.position = file.hasher(), 0

    def run(self) -> bool:
        """Fetch the rest; return whether the file is the promised one.

        Raises:
            PullError: The hub refused, or failed several times in a row.
        """
        fruitless = 0
        while self.position < self._file.size:
            before = self.position
            try:
                self._receive()
                problem = None
            except InterruptedTransferError as error:
                problem = error
            fruitless = 0 if self.position > before else fruitless + 1
            if fruitless >= _ATTEMPTS:
                raise problem or PullError(f"the hub sends no more bytes of {self._file.name}")
            if problem or fruitless:
                time.sleep(PAUSE_SECONDS)
        return self.position == self._file.size and self._hash.hexdigest() == self._file.digest

    def restart(self) -> None:
        """Forget the bytes."""
        self._out.truncate(0)
        self._on_bytes(-self.position)
        self._hash, self.position = self._file.hasher(), 0

    def _receive(self) -> None:
        with self._hub.opened(self._file, self._commit, self.position) as (begin, chunks):
            if begin != self.position:
                self.restart()
            for chunk in chunks:
                self._out.write(chunk)
                self._hash.update(chunk)
                self.position += len(chunk)
                self._on_bytes(len(chunk))
                if self.position > self._file.size:
                    return


def is_intact(file: RemoteFile, path: Path) -> bool:
    """Return whether a complete file has the checksum of the hub."""
    hasher = file.hasher()
    with path.open("rb") as content:
        _hash_rest(content, hasher)
    return hasher.hexdigest() == file.digest


def _hash_rest(content: BinaryIO, hasher: _Hash) -> int:
    """Hash a file from the start; return the size."""
    content.seek(0)
    size = 0
    while chunk := content.read(_HASHED_BYTES):
        hasher.update(chunk)
        size += len(chunk)
    return size
