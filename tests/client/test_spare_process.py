"""Children without a model: the loads in them, and their reservations."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from runner_client import LoadOptions, MemoryGate, errors
from runner_client.memory.estimation import BARE_PROCESS_BYTES, estimate
from runner_client.process.aio_spare import SpareProcess
from runner_common.host_memory.free import FreeMemory
from runner_common.memory.processes import resident_bytes
from runner_common.memory.records import Record
from runner_common.memory.reservations import DIRECTORY_VARIABLE, ReservationBook
from support.fake_child import is_gone, use_fake_child, write_model

MIB, GIB = 2**20, 2**30
LIMIT_SECONDS = 30


@pytest.fixture(autouse=True)
def _no_other_runners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "reservations"))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    use_fake_child(monkeypatch)
    return str(write_model(tmp_path / "tiny"))


def new_spare(total_bytes: int = 100 * GIB) -> SpareProcess:
    """Return a process on a machine with this much memory, of which only the process takes some."""

    def measure() -> FreeMemory:
        free = total_bytes - sum(resident_bytes(pid) for pid in [spare.pid] if pid is not None)
        return FreeMemory(free, "system", free, None, None, "test", "cpu")

    gate = MemoryGate(measure=measure, minimum_bytes=0, settle_seconds=0)
    spare = SpareProcess(gate=gate, timeouts=None, blas="auto", env=None, log=None)
    return spare


def reservations() -> tuple[Record, ...]:
    with ReservationBook().locked() as view:
        return view.records()


def pid_of(spare: SpareProcess) -> int:
    assert spare.pid is not None
    return spare.pid


async def load(spare: SpareProcess, model: str) -> int:
    """Load a model to the end; return the process id."""
    spare.choose(model, LoadOptions())
    await spare.load()
    await spare.wait_until_running()
    return pid_of(spare)


async def test_a_load_runs_in_the_child_and_raises_its_reservation(model: str) -> None:
    spare = new_spare()
    await spare.start()
    pid = pid_of(spare)
    assert (spare.estimate, spare.is_reserved) == (None, True)
    assert [(each.pid, each.need_bytes) for each in reservations()] == [(pid, BARE_PROCESS_BYTES)]
    assert await load(spare, model) == pid
    need = estimate(model)
    assert spare.estimate == need
    assert [(each.pid, each.need_bytes) for each in reservations()] == [(pid, need.total_bytes)]
    assert (await spare.complete("Hi")).content == "Hello world"
    await spare.close()
    assert is_gone(pid)
    assert reservations() == ()


@pytest.mark.parametrize("spare_bytes", [4 * MIB, -4 * MIB])
async def test_the_memory_of_the_child_counts_once(model: str, spare_bytes: int) -> None:
    need = estimate(model).required_bytes
    spare = new_spare(need + spare_bytes)
    await spare.start()
    spare.choose(model, LoadOptions())
    if spare_bytes > 0:
        await spare.load()
        await spare.close()
        return
    with pytest.raises(errors.LoadRequiresFullError) as raised:
        await spare.load()
    assert raised.value.required_bytes == need
    assert raised.value.available_bytes == pytest.approx(need + spare_bytes, abs=2 * MIB)
    assert spare.has_exited
    assert reservations() == ()


async def test_a_start_without_memory_for_the_process_is_refused() -> None:
    spare = new_spare(BARE_PROCESS_BYTES - 1)
    with pytest.raises(errors.LoadRequiresFullError, match="a process without a model requires"):
        await spare.start()
    assert spare.pid is None


async def test_a_changed_environment_needs_a_new_child(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = new_spare()
    await spare.start()
    pid = pid_of(spare)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    new = await load(spare, model)
    assert new != pid
    assert is_gone(pid)
    assert [each.pid for each in reservations()] == [new]
    await spare.close()


async def test_a_changed_command_line_needs_a_new_child(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = new_spare()
    await spare.start()
    pid = pid_of(spare)
    use_fake_child(monkeypatch, "runner.load_seconds = 0")
    assert await load(spare, model) != pid
    assert is_gone(pid)
    await spare.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_child_that_does_not_answer_is_replaced(model: str, number: signal.Signals) -> None:
    spare = new_spare()
    await spare.start()
    pid = pid_of(spare)
    os.kill(pid, number)
    assert await load(spare, model) != pid
    assert is_gone(pid)
    await spare.close()


async def test_a_load_waits_for_a_start_in_progress(model: str) -> None:
    spare = new_spare()
    starting = asyncio.create_task(spare.start())
    await asyncio.sleep(0)
    pid = await load(spare, model)
    await starting
    assert [each.pid for each in reservations()] == [pid]
    await spare.close()


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.3])
async def test_a_close_during_the_start_leaves_nothing(model: str, seconds: float) -> None:
    del model
    spare = new_spare()
    starting = asyncio.create_task(spare.start())
    await asyncio.sleep(seconds)
    async with asyncio.timeout(LIMIT_SECONDS):
        await spare.close()
        await asyncio.gather(starting, return_exceptions=True)
        # A start that began after the close runs to its end.
        await spare.close()
    assert spare.pid is None or is_gone(spare.pid)
    assert reservations() == ()


async def test_a_cancelled_load_stops_the_child(tmp_path: Path, model: str) -> None:
    del model
    spare = new_spare()
    await spare.start()
    pid = pid_of(spare)
    spare.choose(str(tmp_path / "tiny"), LoadOptions())
    loading = asyncio.create_task(spare.load())
    await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert is_gone(pid)
    assert reservations() == ()
