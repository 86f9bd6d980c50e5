"""Memory reservations, shared by every process of a machine."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from runner_common.host_memory.free import FreeMemory, GroupLimit
from runner_common.memory import claims, record_store
from runner_common.memory.claims import Claim, claimed_of
from runner_common.memory.reservations import ReservationBook
from support.fake_child import wait_until
from support.reservations import (
    RESERVE,
    add_reservation,
    claimed_bytes,
    read_line,
    record_files,
    run_script,
    send_line,
)

MIB = 2**20
GIB = 2**30


@pytest.fixture
def book(tmp_path: Path) -> ReservationBook:
    return ReservationBook(tmp_path / "book")


def test_a_need_is_claimed_until_it_is_released(book: ReservationBook) -> None:
    first, second = add_reservation(book, GIB), add_reservation(book, 2 * GIB)
    assert claimed_bytes(book) == 3 * GIB
    assert claimed_bytes(book, (os.getpid(),)) == 0
    first.update(need_bytes=MIB)
    assert claimed_bytes(book) == 2 * GIB + MIB
    first.release()
    first.release()
    first.update(need_bytes=5 * GIB)
    second.release()
    assert claimed_bytes(book) == 0
    assert record_files(book) == []


def test_processes_see_the_reservations_of_others(book: ReservationBook) -> None:
    with run_script(RESERVE, book.directory, GIB) as other:
        assert read_line(other) == "ready"
        assert claimed_bytes(book) == GIB
        assert claimed_bytes(book, (other.pid,)) == 0
        (path,) = record_files(book)
        assert path.stat().st_mode & 0o777 == 0o600
        assert book.directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("is_reaped", [True, False], ids=["reaped", "a zombie"])
def test_a_dead_process_claims_nothing(book: ReservationBook, is_reaped: bool) -> None:
    with run_script(RESERVE, book.directory, GIB) as other:
        assert read_line(other) == "ready"
        os.kill(other.pid, signal.SIGKILL)
        if is_reaped:
            other.wait()
        else:
            os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert claimed_bytes(book) == 0
        assert record_files(book) == []


def test_a_reused_process_id_claims_nothing(book: ReservationBook) -> None:
    add_reservation(book, GIB)
    (path,) = record_files(book)
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "started": record["started"] - 100}))
    assert claimed_bytes(book) == 0
    assert record_files(book) == []


GROW = """
import sys
kept = []
print("ready", flush=True)
while sys.stdin.readline():
    kept.append(b"x" * (64 << 20))
    print("grown", flush=True)
"""


def test_a_claim_shrinks_by_the_memory_its_runner_holds(book: ReservationBook) -> None:
    reservation = add_reservation(book, 256 * MIB)
    with run_script(GROW) as runner:
        assert read_line(runner) == "ready"
        reservation.assign(runner.pid)
        before = claimed_bytes(book)
        assert 200 * MIB < before < 256 * MIB
        for number in (1, 2, 3):
            send_line(runner)
            assert read_line(runner) == "grown"
            assert claimed_bytes(book) == pytest.approx(before - number * 64 * MIB, abs=2 * MIB)
        for _ in range(2):
            send_line(runner)
            assert read_line(runner) == "grown"
        # A runner above its reservation claims nothing, and does not offset other claims.
        assert claimed_bytes(book) == 0
        add_reservation(book, MIB)
        assert claimed_bytes(book) == MIB


def test_the_memory_of_a_runner_is_subtracted_once(book: ReservationBook) -> None:
    with run_script(GROW) as runner:
        assert read_line(runner) == "ready"
        alone = add_reservation(book, 128 * MIB, runner.pid)
        one = claimed_bytes(book)
        add_reservation(book, 128 * MIB, runner.pid)
        assert claimed_bytes(book) == pytest.approx(one + 128 * MIB, abs=MIB)
        # The runner replaces the reservations made on its behalf by its own.
        with book.locked() as view:
            view.drop_owned_by(runner.pid)
            view.add(192 * MIB, "some/model", runner.pid)
        assert claimed_bytes(book) == pytest.approx(one + 64 * MIB, abs=MIB)
        alone.release()
        assert len(record_files(book)) == 1


def test_memory_held_on_a_gpu_is_reported_by_the_runner(book: ReservationBook) -> None:
    with run_script(GROW) as runner:
        assert read_line(runner) == "ready"
        with book.locked() as view:
            reservation = view.add(GIB, "some/model", runner.pid, device="GPU-a")
        assert claimed_bytes(book) == GIB
        reservation.update(held_bytes=GIB // 4)
        assert claimed_bytes(book) == GIB - GIB // 4
        # Too little to be worth a write.
        reservation.update(held_bytes=GIB // 4 + 1000)
        assert claimed_bytes(book) == GIB - GIB // 4


def test_a_deleted_record_is_written_again(
    book: ReservationBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = add_reservation(book, GIB)
    record_files(book)[0].unlink()
    reservation.update(held_bytes=1)
    assert record_files(book) == []
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 4000)
    reservation.update(held_bytes=1)
    assert claimed_bytes(book) == GIB


def _free(**figures: Any) -> FreeMemory:
    values: dict[str, Any] = {
        "available_bytes": 0,
        "source": "system",
        "system_bytes": 20 * GIB,
        "cgroup_bytes": None,
        "device_bytes": None,
        "device_name": "x",
        "device_kind": "cpu",
    }
    return FreeMemory(**{**values, **figures})


def test_a_claim_counts_against_the_memory_it_is_taken_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = {1: ("/a", "/a/b"), 2: ("/a",), 3: ("/c",)}
    monkeypatch.setattr(claims, "is_in_group", lambda pid, group: group in groups[pid])
    three = [Claim(pid, GIB) for pid in groups]
    assert claimed_of(_free(), three) == (3 * GIB, 3)
    within = (GroupLimit("/a/b", 2 * GIB), GroupLimit("/a", 4 * GIB))
    # 2 - 1 of /a/b is less than 4 - 2 of /a and 20 - 3 of the machine.
    assert claimed_of(_free(cgroup_bytes=2 * GIB, groups=within), three) == (GIB, 1)
    # 3 - 2 of /a is less than 2.5 - 1 of /a/b: 1 of the free 2.5 is left.
    tight = (GroupLimit("/a/b", 5 * GIB // 2), GroupLimit("/a", 3 * GIB))
    free_bytes = 5 * GIB // 2
    assert claimed_of(_free(groups=tight, cgroup_bytes=free_bytes), three) == (3 * GIB // 2, 2)


def test_a_claim_on_one_gpu_does_not_count_on_another() -> None:
    gpus = [Claim(1, GIB, "GPU-a"), Claim(2, 2 * GIB, "GPU-b"), Claim(3, 3 * GIB)]
    on_a = _free(device_bytes=8 * GIB, device_id="GPU-a", device_kind="cuda")
    assert claimed_of(on_a, gpus) == (GIB, 1)
    # The machine's memory is the tighter limit here: 5 - 3 against 8 - 1.
    small = _free(system_bytes=5 * GIB, device_bytes=8 * GIB, device_id="GPU-a", device_kind="cuda")
    assert claimed_of(small, gpus) == (3 * GIB, 1)


HOLD_LOCK = """
import os, signal, sys
from pathlib import Path
from runner_common.memory.reservations import ReservationBook

with ReservationBook(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
print("done", flush=True)
sys.stdin.readline()
"""


def test_a_stopped_lock_holder_does_not_block_others_for_long(
    book: ReservationBook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(record_store, "LOCK_SECONDS", 0.5)
    with run_script(HOLD_LOCK, book.directory) as other:
        assert read_line(other) == "locked"
        began = time.monotonic()
        add_reservation(book, GIB)
        assert 0.5 <= time.monotonic() - began < 5
        assert "going on without the lock" in caplog.text
        os.kill(other.pid, signal.SIGCONT)
        assert read_line(other) == "done"
        began = time.monotonic()
        assert claimed_bytes(book) == GIB
        assert time.monotonic() - began < 0.5


def test_a_killed_lock_holder_frees_the_lock_at_once(book: ReservationBook) -> None:
    with run_script(HOLD_LOCK, book.directory) as other:
        assert read_line(other) == "locked"
        os.kill(other.pid, signal.SIGKILL)
        began = time.monotonic()
        assert claimed_bytes(book) == 0
        assert time.monotonic() - began < 5


FORK = """
import os, sys
from pathlib import Path
from runner_common.memory.reservations import ReservationBook

book = ReservationBook(Path(sys.argv[1]))
with book.locked() as view:
    reservation = view.add(int(sys.argv[2]), "some/model")
    child = os.fork()
    if child == 0:
        # The fork owns neither the lock nor the reservation.
        reservation.release()
        os._exit(0)
    os.waitpid(child, 0)
child = os.fork()
if child == 0:
    with book.locked() as view:
        os._exit(0 if view.claimed_bytes() == int(sys.argv[2]) else 1)
print(os.waitpid(child, 0)[1], flush=True)
sys.stdin.readline()
"""


def test_a_fork_neither_releases_nor_blocks(book: ReservationBook) -> None:
    with run_script(FORK, book.directory, GIB) as other:
        assert read_line(other) == "0"
        assert claimed_bytes(book) == GIB


RACE = """
import fcntl, mmap, random, struct, sys, time
from pathlib import Path
from runner_common.memory.reservations import ReservationBook

directory, witness = map(Path, sys.argv[1:3])
size, budget, rounds = map(int, sys.argv[3:])
book = ReservationBook(directory)
file = open(witness, "r+b")
seen = mmap.mmap(file.fileno(), 16)

def count(change):
    # Apart from the book, keep the bytes reserved now and their maximum.
    fcntl.lockf(file, fcntl.LOCK_EX)
    held, most = struct.unpack("qq", seen[:16])
    seen[:16] = struct.pack("qq", held + change, max(most, held + change))
    fcntl.lockf(file, fcntl.LOCK_UN)

admitted = 0
for _ in range(rounds):
    with book.locked() as view:
        if view.claimed_bytes() + size > budget:
            continue
        reservation = view.add(size, "some/model")
    admitted += 1
    count(size)
    time.sleep(random.random() / 500)
    count(-size)
    reservation.release()
print(admitted, flush=True)
"""


def test_processes_that_race_never_exceed_the_budget(book: ReservationBook, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    witness.write_bytes(bytes(16))
    arguments = (book.directory, witness, 3, 10, 300)
    with (
        run_script(RACE, *arguments) as one,
        run_script(RACE, *arguments) as two,
        run_script(RACE, *arguments) as three,
        run_script(RACE, *arguments) as four,
        run_script(RACE, *arguments) as five,
    ):
        admitted = [int(read_line(process)) for process in (one, two, three, four, five)]
    held, most = (int.from_bytes(witness.read_bytes()[at : at + 8], "little") for at in (0, 8))
    assert held == 0
    # Three of the five fit, never four.
    assert most == 9
    assert sum(admitted) > 300
    assert record_files(book) == []


def test_readers_see_whole_records_while_others_come_and_go(book: ReservationBook) -> None:
    kept = add_reservation(book, GIB)
    with run_script(CHURN, book.directory) as other:
        while other.poll() is None:
            with book.locked() as view:
                assert GIB <= view.claimed_bytes() <= GIB + 7
        assert other.returncode == 0
    wait_until(lambda: claimed_bytes(book) == GIB)
    kept.release()


CHURN = """
import sys
from pathlib import Path
from runner_common.memory.reservations import ReservationBook

book = ReservationBook(Path(sys.argv[1]))
for _ in range(150):
    with book.locked() as view:
        reservation = view.add(7, "some/model")
    reservation.update(need_bytes=5)
    reservation.release()
"""
