"""Files of the prefix cache on disk: their format, their modes, and every kind of damage."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from runner_server.engine.prefix_disk import block_files
from runner_server.engine.prefix_disk.block_files import (
    HEADER_BYTES,
    DamagedBlockError,
    block_path,
    read_block,
    write_block,
)

NAME, OTHER = "ab" * 16, "cd" * 16
PAYLOAD = bytes(range(256)) * 4


def test_a_block_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_block(tmp_path, NAME, PAYLOAD)
    assert read_block(tmp_path, NAME, len(PAYLOAD)) == PAYLOAD


@pytest.mark.parametrize("mask", [0o000, 0o777])
def test_only_the_user_can_read_a_block_whatever_the_umask(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write_block(tmp_path, NAME, PAYLOAD)
    finally:
        os.umask(before)
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


# Every field of the header, and the first, a middle and the last byte of the payload.
@pytest.mark.parametrize("position", [*range(HEADER_BYTES), HEADER_BYTES, 500, -1])
def test_a_changed_bit_is_damage(tmp_path: Path, position: int) -> None:
    write_block(tmp_path, NAME, PAYLOAD)
    content = bytearray(block_path(tmp_path, NAME).read_bytes())
    content[position] ^= 1 << position % 8
    block_path(tmp_path, NAME).write_bytes(content)
    with pytest.raises(DamagedBlockError):
        read_block(tmp_path, NAME, len(PAYLOAD))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _zero(path: Path) -> None:
    """As after a power failure: the size is right, and the content was never written."""
    path.write_bytes(bytes(path.stat().st_size))


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _of_another_name(path: Path) -> None:
    write_block(path.parent, OTHER, PAYLOAD)
    block_path(path.parent, OTHER).rename(path)


@pytest.mark.parametrize(
    "damage", [_truncate, _lengthen, _empty, _zero, _link, _pipe, _folder, _of_another_name]
)
def test_anything_but_the_block_is_damage(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_block(tmp_path, NAME, PAYLOAD)
    damage(block_path(tmp_path, NAME))
    with pytest.raises(DamagedBlockError):
        read_block(tmp_path, NAME, len(PAYLOAD))


def test_a_block_of_another_format_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_block(tmp_path, NAME, PAYLOAD)
    monkeypatch.setattr(block_files, "FORMAT_VERSION", block_files.FORMAT_VERSION + 1)
    with pytest.raises(DamagedBlockError):
        read_block(tmp_path, NAME, len(PAYLOAD))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    def write(_number: int, data: memoryview) -> int:
        written.append(len(data))
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return len(data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space"):
        write_block(tmp_path, NAME, PAYLOAD)
    assert not [*tmp_path.iterdir()]
