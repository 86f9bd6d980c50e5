"""Loads are admitted by free memory, less the reservations of other processes."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.host_memory.free import FreeMemory, GroupLimit
from runner_common.memory.headroom import MINIMUM_VARIABLE, OVERHEAD_VARIABLE, VariableError
from runner_common.memory.need import MemoryNeed
from runner_common.memory.records import Record
from runner_common.memory.reservations import ReservationBook
from runner_server.errors import InsufficientMemory
from runner_server.host.machine_admission import MachineAdmission
from support.harness import StartServer
from support.reservations import RESERVE, add_reservation, read_line, record_files, run_script

GIB = 2**30
NEED = MemoryNeed(8 * GIB, 4 * GIB, 2 * GIB, GIB, GIB, 0, has_default_prefix_cache=True)
"""16 GiB in total, 14 GiB without the prefix cache."""

EXACT = replace(NEED, has_default_prefix_cache=False)
ME = os.getpid()


@pytest.fixture
def book(tmp_path: Path) -> ReservationBook:
    """Reservations of this test alone."""
    return ReservationBook(tmp_path / "book")


@pytest.fixture(autouse=True)
def resident(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes held by this process; nothing is kept free."""
    held = {"bytes": 0}
    monkeypatch.setenv(MINIMUM_VARIABLE, "0")
    monkeypatch.setattr(
        "runner_server.host.machine_admission.resident_bytes", lambda: held["bytes"]
    )
    return held


def free(available_bytes: int, **changes: Any) -> FreeMemory:
    plain = FreeMemory(available_bytes, "system", available_bytes, None, None, "Some CPU", "cpu")
    return replace(plain, **changes)


def on_gpu(device_bytes: int, system_bytes: int = 64 * GIB, **changes: Any) -> FreeMemory:
    return free(
        min(device_bytes, system_bytes),
        source="device" if device_bytes < system_bytes else "system",
        system_bytes=system_bytes,
        device_bytes=device_bytes,
        device_kind="cuda",
        **changes,
    )


def admission(book: ReservationBook, measured: FreeMemory) -> MachineAdmission:
    return MachineAdmission(book, measure=lambda: measured)


def own_records(book: ReservationBook) -> list[Record]:
    """Return the records of this process."""
    with book.locked() as view:
        return [record for record in view.records() if record.pid == ME]


@contextmanager
def other_process(book: ReservationBook, size: int) -> Iterator[subprocess.Popen[str]]:
    """Run a process with a reservation of ``size`` bytes."""
    with run_script(RESERVE, book.directory, size) as process:
        assert read_line(process) == "ready"
        yield process


def test_a_load_that_fits_is_reserved(book: ReservationBook) -> None:
    granted = admission(book, free(16 * GIB)).admit("m", NEED, override=False)
    assert granted == NEED.total_bytes
    (record,) = own_records(book)
    assert (record.need_bytes, record.model, record.is_assigned) == (granted, "m", True)


def test_a_default_prefix_cache_shrinks_to_the_available_memory(book: ReservationBook) -> None:
    granted = admission(book, free(15 * GIB)).admit("m", NEED, override=False)
    assert granted == 15 * GIB
    assert own_records(book)[0].need_bytes == granted
    assert admission(book, free(14 * GIB)).admit("m", NEED, override=False) == 14 * GIB


def test_a_requested_prefix_cache_does_not_shrink(book: ReservationBook) -> None:
    with pytest.raises(InsufficientMemory):
        admission(book, free(16 * GIB - 1)).admit("m", EXACT, override=False)
    assert admission(book, free(16 * GIB)).admit("m", EXACT, override=False) == 16 * GIB


def test_a_refusal_has_the_numbers_and_reserves_nothing(
    book: ReservationBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MINIMUM_VARIABLE, str(2 * GIB))
    monkeypatch.setenv(OVERHEAD_VARIABLE, str(GIB))
    with other_process(book, 4 * GIB), pytest.raises(InsufficientMemory) as caught:
        admission(book, free(20 * GIB)).admit("m", NEED, override=False)
    assert caught.value.metadata == {
        "requiredBytes": str(14 * GIB),
        "availableBytes": str(13 * GIB),
    }
    expected = (
        "the model needs 14.0 GiB, most of it weights (8.0 GiB), and 13.0 GiB are available: "
        "20.0 GiB free, less 3.0 GiB kept free and 4.0 GiB that other runners may still take"
    )
    assert str(caught.value).startswith(expected)
    assert not own_records(book)


def test_an_override_reserves_its_need(book: ReservationBook) -> None:
    granted = admission(book, free(GIB)).admit("m", NEED, override=True)
    assert granted == NEED.required_bytes
    assert own_records(book)[0].need_bytes == granted


def test_reservations_of_other_processes_count_until_they_end(book: ReservationBook) -> None:
    machine = admission(book, free(16 * GIB))
    with other_process(book, 3 * GIB):
        with pytest.raises(InsufficientMemory):
            machine.admit("m", NEED, override=False)
        decision = machine.compare(NEED.required_bytes)
        assert (decision.fits, decision.reserved_bytes) == (False, 3 * GIB)
        assert decision.available_bytes == 13 * GIB
    assert machine.admit("m", NEED, override=False)


def test_the_record_of_this_process_is_replaced(book: ReservationBook) -> None:
    """Replace any own record, including one made by a gate before the process started."""
    add_reservation(book, 30 * GIB, pid=ME)
    machine = admission(book, free(16 * GIB))
    assert machine.admit("a", NEED, override=False) == 16 * GIB
    assert machine.admit("b", NEED, override=False) == 16 * GIB
    assert [record.model for record in own_records(book)] == ["b"]
    assert len(record_files(book)) == 1


def test_a_refusal_drops_the_earlier_reservation(book: ReservationBook) -> None:
    machine = admission(book, free(16 * GIB))
    machine.admit("a", NEED, override=False)
    with pytest.raises(InsufficientMemory):
        machine.admit("b", replace(NEED, kv_bytes=99 * GIB), override=False)
    assert not own_records(book)


def test_release_drops_the_reservation(book: ReservationBook) -> None:
    machine = admission(book, free(16 * GIB))
    machine.admit("m", NEED, override=False)
    machine.release()
    machine.release()
    assert not own_records(book)
    assert not record_files(book)


def test_memory_held_by_this_process_counts_as_free(
    book: ReservationBook, resident: dict[str, int]
) -> None:
    resident["bytes"] = 5 * GIB
    machine = admission(book, free(9 * GIB))
    decision = machine.compare(14 * GIB)
    assert (decision.fits, decision.available_bytes) == (True, 14 * GIB)
    assert not machine.compare(14 * GIB + 1).fits
    assert machine.admit("m", NEED, override=False) == 14 * GIB


def test_memory_held_by_this_process_is_within_every_limit(
    book: ReservationBook, resident: dict[str, int]
) -> None:
    resident["bytes"] = GIB
    groups = (GroupLimit("/sys/fs/cgroup/a", 6 * GIB), GroupLimit("/sys/fs/cgroup", 9 * GIB))
    measured = free(
        6 * GIB, source="cgroup", system_bytes=20 * GIB, cgroup_bytes=6 * GIB, groups=groups
    )
    assert admission(book, measured).compare(1).available_bytes == 7 * GIB


def test_gpu_memory_held_counts_as_free_once_reported(
    book: ReservationBook, resident: dict[str, int]
) -> None:
    resident["bytes"] = GIB
    machine = admission(book, on_gpu(0, device_id="GPU-1"))
    assert machine.compare(1).available_bytes == 0
    machine.note_held(20 * GIB)
    assert machine.compare(1).available_bytes == 20 * GIB
    # The next limit is the system's memory, through which the weights pass.
    machine.note_held(80 * GIB)
    assert machine.compare(1).available_bytes == 65 * GIB
    # A load is decided after the old model is gone, whose last report may be late.
    with pytest.raises(InsufficientMemory):
        machine.admit("m", NEED, override=False)
    machine.release()
    assert machine.compare(1).available_bytes == 0


def test_the_working_set_of_metal_does_not_depend_on_held_memory(
    book: ReservationBook, resident: dict[str, int]
) -> None:
    resident["bytes"] = 4 * GIB
    measured = replace(on_gpu(10 * GIB), device_kind="metal")
    machine = admission(book, measured)
    machine.note_held(4 * GIB)
    assert machine.compare(1).available_bytes == 10 * GIB


def test_a_reservation_names_its_gpu(book: ReservationBook) -> None:
    machine = admission(book, on_gpu(40 * GIB, device_id="GPU-1"))
    machine.admit("m", NEED, override=False)
    machine.note_held(3 * GIB)
    (record,) = own_records(book)
    assert (record.device, record.held_bytes) == ("GPU-1", 3 * GIB)


def test_held_memory_is_not_noted_without_a_reservation(book: ReservationBook) -> None:
    machine = admission(book, free(16 * GIB))
    machine.note_held(GIB)
    assert not own_records(book)


def test_spare_memory_excludes_reservations_of_others(
    book: ReservationBook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Subtract only the reservations of other processes."""
    machine = admission(book, free(16 * GIB))
    machine.admit("m", NEED, override=False)
    assert machine.spare_bytes() == 16 * GIB
    monkeypatch.setenv(MINIMUM_VARIABLE, str(3 * GIB))
    with other_process(book, 15 * GIB):
        assert machine.spare_bytes() == -2 * GIB


def test_a_comparison_reserves_nothing(book: ReservationBook) -> None:
    assert admission(book, free(16 * GIB)).compare(GIB).fits
    assert not record_files(book)


@pytest.mark.parametrize("variable", [MINIMUM_VARIABLE, OVERHEAD_VARIABLE])
def test_a_variable_that_is_not_a_number_fails_at_the_start(
    book: ReservationBook, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "much")
    with pytest.raises(VariableError, match=variable):
        admission(book, free(GIB))


async def test_a_load_keeps_the_gates_reservation_until_it_has_its_own(
    start_server: StartServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep the gate's reservation until the load has one; otherwise another process may take it."""
    server = await start_server()
    asked: list[bool] = []
    release = server.backend.release

    def note(*, for_next: bool = False) -> None:
        asked.append(for_next)
        release(for_next=for_next)

    monkeypatch.setattr(server.backend, "release", note)
    await server.load()
    await server.load()
    assert asked == [True, True]
    await server.stub.Unload(pb.UnloadRequest())
    assert asked == [True, True, False]
