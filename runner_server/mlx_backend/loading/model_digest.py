"""Digest of the files of a model or an adapter, for the names of entries of the prefix cache.

Wrong keys and values would change answers without a sign, so the digest is that of every byte of
the weights and of their configuration. It is computed once and remembered by the identity of the
files: device, inode, size, and the times of the last change of the content and of the inode. No
program can set the last of these, so files with the same identity have the same content. Names,
headers or samples of the weights would not prove that.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Self

from runner_common.cores import usable_cores
from runner_common.model_directory import ModelDirectory

_CONFIGURATION = ("config.json", "hf_quant_config.json")

_PART_BYTES = 16 << 20
_MOST_THREADS = 8
_DIGEST = re.compile(r"[0-9a-f]{64}")


class DigestedFiles:
    """Files with influence on the keys and values of a model.

    Args:
        files: The files, in a fixed order.

    Raises:
        OSError: A file does not exist.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._identity = self._identify()

    @classmethod
    def of(cls, directory: ModelDirectory) -> Self:
        """Return the files of a model without adapters."""
        present = (directory.path / name for name in _CONFIGURATION)
        return cls([*(file for file in present if file.exists()), *directory.weight_files])

    def digest(self, remembered_in: Path | None, beat: Callable[[], object]) -> str | None:
        """Return the digest of the files' content.

        Args:
            remembered_in: Private folder with the digests of earlier calls; None computes it.
            beat: Called after each part of a file that is read; an exception ends the reading.

        Returns:
            None if a file was changed since the creation of this object.
        """
        if remembered_in is None:
            digest = self._compute(beat)
            return digest if self._identify() == self._identity else None
        name = hashlib.sha256(self._identity.encode()).hexdigest()
        memory = remembered_in / f"{name[:32]}.digest"
        digest = _read(memory) or self._compute(beat)
        if self._identify() != self._identity:
            return None
        _remember(memory, digest)
        return digest

    def _identify(self) -> str:
        return repr([_identity(file) for file in self._files])

    def _compute(self, beat: Callable[[], object]) -> str:
        whole = hashlib.sha256()
        with ThreadPoolExecutor(min(usable_cores().count, _MOST_THREADS)) as pool:
            for file in self._files:
                size = file.stat().st_size
                whole.update(size.to_bytes(8, "little"))
                starts = range(0, size, _PART_BYTES)
                for part in pool.map(_digest_part, [file] * len(starts), starts):
                    whole.update(part)
                    beat()
        return whole.hexdigest()


def _identity(file: Path) -> tuple[int, ...]:
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _digest_part(file: Path, start: int) -> bytes:
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        data = bytearray(max(0, min(_PART_BYTES, file.stat().st_size - start)))
        count, view = 0, memoryview(data)
        while more := opened.readinto(view[count:]):
            count += more
        return hashlib.sha256(view[:count]).digest()


def _read(memory: Path) -> str | None:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        # Private to this user, like all of the folder.
        with memory.open("rb") as file:
            text = file.read(65).decode()
        return text if _DIGEST.fullmatch(text) else None
    return None


def _remember(memory: Path, digest: str) -> None:
    # Best effort: the next load computes it again.
    with contextlib.suppress(OSError):
        temporary = memory.with_suffix(f".{secrets.token_hex(8)}.tmp")
        temporary.touch(0o600, exist_ok=False)
        temporary.write_text(digest)
        temporary.replace(memory)
