"""The directory of the prefix cache on disk: budget, sharing, failures and shutdown."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from runner_server.engine.prefix_disk import BlockStore
from runner_server.engine.prefix_disk import store as store_module
from runner_server.engine.prefix_disk.block_files import HEADER_BYTES, block_path, write_block

SIZE = 1000
FILE_BYTES = SIZE + HEADER_BYTES
DEADLINE_SECONDS = 20.0

Open = Callable[..., BlockStore]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Open]:
    """Open stores of the same directory."""
    stores: list[BlockStore] = []

    def open_(files: float = 100) -> BlockStore:
        stores.append(BlockStore(tmp_path, int(files * FILE_BYTES), SIZE))
        return stores[-1]

    yield open_
    for store in stores:
        store.close(DEADLINE_SECONDS)


def _name(number: int) -> str:
    return f"{number:032x}"


def _payload(number: int) -> bytes:
    return bytes([number]) * SIZE


def _write(store: BlockStore, *numbers: int) -> None:
    """Write blocks, and wait for the end or the failure of the last write."""
    for number in numbers:
        assert store.wait_room(DEADLINE_SECONDS)
        store.write(_name(number), _payload(number))
    assert store.wait_room(DEADLINE_SECONDS)
    store.cancel_room()


def _held(directory: Path) -> list[int]:
    return sorted(int(path.stem, 16) for path in directory.glob("*.kv"))


def _age(directory: Path, *numbers: int) -> None:
    """Set the last use of blocks, in order, to a time long ago."""
    for i, number in enumerate(numbers):
        used = time.time() - 10_000 + i
        os.utime(block_path(directory, _name(number)), (used, used))


def test_blocks_are_found_and_read_by_another_store(open_store: Open) -> None:
    first = open_store()
    _write(first, 1, 2)
    assert first.counters.written_bytes == first.counters.held_bytes == 2 * FILE_BYTES
    second = open_store()
    assert [_name(i) in second for i in (1, 2, 3)] == [True, True, False]
    assert second.read(_name(2)).result(DEADLINE_SECONDS) == bytearray(_payload(2))
    assert second.counters.read_bytes == FILE_BYTES
    assert second.counters.held_bytes == 2 * FILE_BYTES


def test_the_blocks_unused_for_longest_are_deleted(open_store: Open, tmp_path: Path) -> None:
    store = open_store(files=4)
    _write(store, 1, 2, 3, 4)
    _age(tmp_path, 2, 4, 1, 3)
    store.touch([_name(2)], is_new=True)
    _write(store, 5)
    assert _held(tmp_path) == [1, 2, 3, 5] or _held(tmp_path) == [2, 3, 5]
    assert _name(4) not in store
    assert store.counters.held_bytes == len(_held(tmp_path)) * FILE_BYTES


def test_the_beginning_of_a_sequence_is_deleted_last(open_store: Open, tmp_path: Path) -> None:
    store = open_store(files=6)
    _write(store, 1, 2, 3, 4, 5)
    store.touch([_name(i) for i in range(1, 6)], is_new=True)
    _write(store, 6, 7)
    held = _held(tmp_path)
    assert held[:3] == [1, 2, 3]
    assert 5 not in held


def test_several_stores_keep_one_budget(open_store: Open, tmp_path: Path) -> None:
    stores = [open_store(files=40) for _ in range(3)]
    for i in range(90):
        _write(stores[i % 3], i)
        # Each may exceed the budget by the blocks that others wrote since its last listing.
        assert len(_held(tmp_path)) <= 40 + 2 * (40 / 16 + 1)
    assert len(_held(tmp_path)) >= 30


def test_other_files_are_neither_counted_nor_deleted(open_store: Open, tmp_path: Path) -> None:
    other = tmp_path / "notes.txt"
    other.write_bytes(bytes(10 * FILE_BYTES))
    store = open_store(files=2)
    _write(store, 1, 2, 3, 4)
    assert other.exists()
    assert 1 <= len(_held(tmp_path)) <= 2


def test_remains_of_killed_writers_are_deleted(open_store: Open, tmp_path: Path) -> None:
    old, new = (tmp_path / f"{_name(i)}.{'0' * 16}.tmp" for i in range(2))
    for each in (old, new):
        each.write_bytes(b"part")
    os.utime(old, (1, 1))
    open_store()
    assert (old.exists(), new.exists()) == (False, True)


# -- failures --------------------------------------------------------------------


def test_a_damaged_block_is_removed_and_not_found_again(
    open_store: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_block(tmp_path, _name(1), _payload(1)[:-1])
    store = open_store()
    assert store.read(_name(1)).result(DEADLINE_SECONDS) is None
    assert _name(1) not in store
    assert store.counters.damaged_count == 1
    _write(store, 2)
    assert _held(tmp_path) == [2]
    assert "is damaged and will be removed: it has" in caplog.text


def test_a_block_that_vanished_is_not_found_again(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    _write(store, 1)
    block_path(tmp_path, _name(1)).unlink()
    assert store.read(_name(1)).result(DEADLINE_SECONDS) is None
    assert _name(1) not in store
    assert store.counters.damaged_count == 0


def test_removed_blocks_are_not_found(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    _write(store, 1, 2)
    store.remove([_name(1), _name(9)])
    assert _name(1) not in store
    _write(store, 3)
    assert _held(tmp_path) == [2, 3]


def test_a_block_removed_while_it_is_queued_is_not_found(
    open_store: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, goes_on = open_store(), threading.Event()

    def wait(directory: Path, name: str, payload: bytes) -> None:
        assert goes_on.wait(DEADLINE_SECONDS)
        write_block(directory, name, payload)

    monkeypatch.setattr(store_module, "write_block", wait)
    assert store.wait_room(0)
    store.write(_name(1), _payload(1))
    store.remove([_name(1)])
    goes_on.set()
    _write(store, 2)
    assert _name(1) not in store
    assert _held(tmp_path) == [2]


def test_a_directory_that_vanishes_costs_only_its_blocks(
    open_store: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store()
    _write(store, 1)
    elsewhere = tmp_path.with_name("elsewhere")
    tmp_path.rename(elsewhere)
    try:
        _write(store, 2)
        assert store.is_paused
        assert _name(2) not in store
        assert store.read(_name(1)).result(DEADLINE_SECONDS) is None
        store.touch([_name(1)], is_new=True)
        store.remove([_name(1)])
    finally:
        elsewhere.rename(tmp_path)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_full_disk_is_reported_once_and_tried_again_later(
    open_store: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = open_store()

    def fail(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, "_PAUSE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_block", fail)
        _write(store, 1, 2)
    assert caplog.text.count("No space left on device") == 1
    assert _name(1) not in store
    _write(store, 1)
    assert _held(tmp_path) == [1]


def test_nothing_is_written_during_a_pause(
    open_store: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store()

    def fail(*_arguments: object) -> None:
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(store_module, "write_block", fail)
        _write(store, 1)
    _write(store, 2)
    assert not _held(tmp_path)
    assert _name(2) not in store


def test_a_write_that_hangs_neither_collects_blocks_nor_delays_the_end(
    open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, goes_on, has_begun = open_store(), threading.Event(), threading.Event()

    def hang(*_arguments: object) -> None:
        has_begun.set()
        goes_on.wait(DEADLINE_SECONDS)

    monkeypatch.setattr(store_module, "write_block", hang)
    monkeypatch.setattr(store_module, "_HANG_SECONDS", 0.0)
    assert store.wait_room(0)
    store.write(_name(1), _payload(1))
    try:
        assert has_begun.wait(DEADLINE_SECONDS)
        assert not store.wait_room(0)
        assert store.is_paused
        store.close(0.01)
    finally:
        goes_on.set()


def test_what_is_queued_is_written_before_the_end(open_store: Open, tmp_path: Path) -> None:
    store = open_store()
    assert store.wait_room(0)
    store.write(_name(1), _payload(1))
    store.close(DEADLINE_SECONDS)
    assert _held(tmp_path) == [1]


def test_a_directory_that_cannot_be_listed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        BlockStore(tmp_path / "none", 100, 10)
