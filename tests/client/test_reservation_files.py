"""Reservation files: invalid records, unsafe directories, other users and a full disk."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from runner_common.memory import record_store
from runner_common.memory.processes import machine_scope
from runner_common.memory.records import RecordFolder, encode
from runner_common.memory.reservations import ReservationBook
from support.reservations import add_reservation, claimed_bytes, read_line, record_files, run_script

MIB = 2**20
GIB = 2**30
ROOT = os.geteuid() == 0


@pytest.fixture
def book(tmp_path: Path) -> ReservationBook:
    return ReservationBook(tmp_path / "book")


def test_records_of_another_boot_or_container_are_left_alone(book: ReservationBook) -> None:
    add_reservation(book, GIB)
    (path,) = record_files(book)
    record = json.loads(path.read_text())
    assert record["scope"] == machine_scope()
    path.write_text(json.dumps({**record, "scope": "another", "pid": 2**30}))
    assert claimed_bytes(book) == 0
    assert record_files(book) == [path]


ODD: dict[str, bytes | dict[str, object]] = {
    "empty": b"",
    "cut": b'{"version": 1, "need_by',
    "a list": b"[]",
    "a number": b"7",
    "not text": b"\xff\xfe\x00",
    "deep": b"[" * 10_000,
    "another version": {"version": 2},
    "no version": {"version": None},
    "a field more": {"colour": "red"},
    "negative": {"need_bytes": -1},
    "too much": {"need_bytes": 2**70},
    "a fraction": {"need_bytes": 0.5},
    "a truth": {"held_bytes": True},
    "no process": {"pid": 0},
    "every process": {"pid": -1},
    "too high": {"pid": 2**40},
    "words": {"need_bytes": "much"},
    "long": {"model": "x" * 20_000},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_a_file_that_is_not_a_record_is_ignored(
    book: ReservationBook, odd: bytes | dict[str, object]
) -> None:
    add_reservation(book, GIB)
    (path,) = record_files(book)
    if isinstance(odd, bytes):
        data = odd
    else:
        data = json.dumps({**json.loads(path.read_text()), **odd}).encode()
    (book.directory / "odd.json").write_bytes(data)
    assert claimed_bytes(book) == GIB
    assert (book.directory / "odd.json").read_bytes() == data


def test_anything_but_a_regular_file_is_ignored_without_blocking(book: ReservationBook) -> None:
    kept = add_reservation(book, GIB)
    (path,) = record_files(book)
    (book.directory / "link.json").symlink_to(path)
    (book.directory / "folder.json").mkdir()
    os.mkfifo(book.directory / "pipe.json")
    (book.directory / "notes.txt").write_text("hello")
    began = time.monotonic()
    assert claimed_bytes(book) == GIB
    assert time.monotonic() - began < 5
    kept.release()
    assert claimed_bytes(book) == 0


def test_unfinished_writes_are_removed(book: ReservationBook) -> None:
    add_reservation(book, GIB)
    fresh, old = book.directory / "a.new", book.directory / "b.new"
    for path in (fresh, old):
        path.write_text("{")
    os.utime(old, (0, 0))
    assert claimed_bytes(book) == GIB
    assert fresh.exists()
    assert not old.exists()


def _open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o755)


def _link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")


def _of_another(path: Path) -> None:
    path.mkdir(mode=0o700)
    if not ROOT:
        pytest.skip("only the superuser can give a directory away")
    os.chown(path, 12345, 12345)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (_open_to_all, "has mode 0755; it must be 0700"),
        (_link, "as a directory"),
        (_of_another, "belongs to user 12345"),
        (Path.touch, "as a directory"),
    ],
)
def test_a_directory_that_others_could_write_to_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, make: Any, why: str
) -> None:
    make(tmp_path / "book")
    book = ReservationBook(tmp_path / "book")
    reservation = add_reservation(book, GIB)
    # Within this process the reservations still count.
    assert claimed_bytes(ReservationBook(tmp_path / "book")) == GIB
    reservation.release()
    assert claimed_bytes(book) == 0
    (said,) = caplog.messages
    assert said.startswith("memory reservations are visible within this process only: ")
    assert why in said
    assert not list(tmp_path.rglob("*.json"))


def test_a_full_disk_keeps_reservations_within_the_process(
    book: ReservationBook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RecordFolder, "write", full)
        reservation = add_reservation(book, GIB)
        assert claimed_bytes(book) == GIB
        assert "No space left on device" in caplog.text
    # The next change writes the record.
    assert record_files(book) == []
    reservation.update(need_bytes=2 * GIB)
    assert claimed_bytes(book) == 2 * GIB
    assert len(record_files(book)) == 1
    reservation.release()
    assert claimed_bytes(book) == 0


OWN = """
import os, sys
from pathlib import Path
from runner_common.memory import record_store
from runner_common.memory.processes import machine_scope
from runner_common.memory.reservations import ReservationBook

# Look up the scope, which is cached, while root may still read it.
machine_scope()
os.setgroups([])
os.setresgid(12345, 12345, 12345)
os.setresuid(12345, 12345, 12345)
record_store.SHARED = Path(sys.argv[1])
book = ReservationBook()
with book.locked() as view:
    before = view.claimed_bytes()
    view.add(int(sys.argv[2]), "some/model")
print(before, book.directory.name, flush=True)
sys.stdin.readline()
"""


@pytest.mark.skipif(not ROOT, reason="only the superuser can be two users")
def test_the_superuser_counts_the_runners_of_all_users(
    monkeypatch: pytest.MonkeyPatch, socket_dir: Path
) -> None:
    socket_dir.chmod(0o1777)
    monkeypatch.setattr(record_store, "SHARED", socket_dir)
    monkeypatch.delenv("MLX_RUNNER_RUNTIME_DIR")
    mine = ReservationBook()
    reservation = add_reservation(mine, MIB)
    with run_script(OWN, socket_dir, GIB) as other:
        # Another user does not see the superuser's reservations.
        assert read_line(other) == "0 mlx-runner-12345"
        assert claimed_bytes(mine) == GIB + MIB
        # A user's record about another user's process does not count.
        (theirs,) = (socket_dir / "mlx-runner-12345").glob("*.json")
        with mine.locked() as view:
            lie = next(record for record in view.records() if record.pid == os.getpid())
        theirs.write_bytes(encode(lie))
        os.chown(theirs, 12345, 12345)
        assert claimed_bytes(mine) == MIB
    # Nor does a directory whose owner is not the user in its name.
    (socket_dir / "mlx-runner-12345").rename(socket_dir / "mlx-runner-54321")
    assert claimed_bytes(mine) == MIB
    reservation.release()
    assert claimed_bytes(mine) == 0


def test_a_repeated_warning_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "book").touch()
    for _ in range(3):
        claimed_bytes(ReservationBook(tmp_path / "book"))
    assert len(caplog.messages) == 1
