"""Memory in RunnerProcess: reservations, headroom, and the format of the weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from runner_client import LoadOptions, MemoryGate, RunnerProcess, errors
from runner_client.memory.estimation import MemoryEstimate, estimate
from runner_client.memory.gate import MINIMUM_BYTES, MINIMUM_VARIABLE, OVERHEAD_VARIABLE
from runner_common.host_memory.free import FreeMemory
from runner_common.memory.reservations import DIRECTORY_VARIABLE, ReservationBook
from support.fake_child import use_fake_child, use_script, wait_until, write_model
from support.process_view import ProcessView


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model(tmp_path / "tiny"))


@pytest.fixture
def fake_child(monkeypatch: pytest.MonkeyPatch) -> None:
    use_fake_child(monkeypatch)


def free(available_bytes: int) -> Callable[[], FreeMemory]:
    """Return a measurement of this much free memory."""
    return lambda: FreeMemory(
        available_bytes=available_bytes,
        source="system",
        system_bytes=available_bytes,
        cgroup_bytes=None,
        device_bytes=None,
        device_name="test",
        device_kind="cpu",
    )


def load_request_of(runner: RunnerProcess) -> str:
    """Return the load request of a closed fake child, as printed to stderr on exit."""
    return ProcessView.of(runner).stderr_tail[0]


def reserved(gate: MemoryGate, need: MemoryEstimate) -> int:
    """Return the memory counted by a gate as reserved by runners."""
    return gate.check(need, override=True).reserved_bytes


@pytest.mark.usefixtures("fake_child")
def test_the_memory_is_reserved_while_the_runner_lives(model: str) -> None:
    gate = MemoryGate(measure=free(2**30), settle_seconds=0)
    runner = RunnerProcess(model, gate=gate, prefix_cache_bytes=0)
    try:
        need = runner.load()
        runner.wait_until_running()
        assert runner.pid is not None
        left = need.total_bytes - psutil.Process(runner.pid).memory_info().rss
        assert reserved(gate, need) == pytest.approx(left, abs=2**25)
        assert left > 2**25
    finally:
        runner.close()
    assert reserved(gate, need) == 0


@pytest.mark.usefixtures("fake_child")
def test_a_close_releases_the_reservation(model: str) -> None:
    gate = MemoryGate(measure=free(2**30), settle_seconds=0)
    runner = RunnerProcess(model, gate=gate)
    need = runner.load()
    runner.close()
    assert reserved(gate, need) == 0


@pytest.mark.usefixtures("fake_child")
def test_a_death_releases_the_reservation(model: str) -> None:
    gate = MemoryGate(measure=free(2**30), settle_seconds=0)
    with RunnerProcess(model, gate=gate) as runner:
        assert runner.pid is not None
        assert runner.estimate is not None
        os.kill(runner.pid, signal.SIGKILL)
        wait_until(lambda: runner.has_exited)
        assert runner.estimate is not None
        assert reserved(gate, runner.estimate) == 0
        wait_until(lambda: not reservation_files(gate))


def reservation_files(gate: MemoryGate) -> list[Path]:
    """Return the files of a gate's reservations."""
    return list(gate.book().directory.glob("*.json"))


def test_a_failed_start_releases_the_reservation(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_script(monkeypatch, "import sys; sys.exit('no such device')")
    gate = MemoryGate(measure=free(2**30), settle_seconds=0)
    with pytest.raises(errors.RunnerExitedError):
        RunnerProcess(model, gate=gate).load()
    assert reservation_files(gate) == []
    monkeypatch.setattr(
        "runner_client.process.launch.server_command", lambda _listen: ["/no/such/file"]
    )
    with pytest.raises(errors.RunnerUnavailableError):
        RunnerProcess(model, gate=gate).load()
    assert reservation_files(gate) == []


@pytest.mark.usefixtures("fake_child")
def test_a_reservation_around_the_start_is_not_counted_twice(model: str) -> None:
    """The documentation once advised to reserve around the start."""
    need = estimate(model, prefix_cache_bytes=0)
    gate = gate_for(need)
    assert 2 * need.total_bytes > gate.check(need).available_bytes
    with gate.reserve(need):
        runner = RunnerProcess(model, gate=gate, prefix_cache_bytes=0)
        runner.load()
    try:
        assert 0 < reserved(gate, need) < need.total_bytes
    finally:
        runner.close()
    assert reserved(gate, need) == 0


@pytest.mark.usefixtures("fake_child")
def test_other_processes_see_the_reservation(model: str) -> None:
    gate = MemoryGate(measure=free(2**30), settle_seconds=0)
    with RunnerProcess(model, gate=gate) as runner:
        assert runner.estimate is not None
        here = reserved(gate, runner.estimate)
        script = (
            "from runner_common.memory.reservations import ReservationBook\n"
            "with ReservationBook().locked() as view: print(view.claimed_bytes())"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        there = subprocess.check_output([sys.executable, "-c", script], env=environment)
        assert int(there) == pytest.approx(here, abs=2**24)
        assert here > 2**24


@pytest.mark.usefixtures("fake_child")
def test_the_overhead_comes_from_the_childs_environment(model: str) -> None:
    gate = MemoryGate(measure=free(2**30), settle_seconds=0)
    env = {OVERHEAD_VARIABLE: str(2**30), MINIMUM_VARIABLE: "7"}
    with pytest.raises(errors.InsufficientMemoryError) as caught:
        RunnerProcess(model, gate=gate, env=env).load()
    assert caught.value.overhead_bytes == 2**30 + 7
    with pytest.raises(errors.InvalidRequestError, match=OVERHEAD_VARIABLE):
        RunnerProcess(model, env={OVERHEAD_VARIABLE: "much"}).load()


@pytest.mark.parametrize("numbers", [None, (5, 6)])
def test_the_child_gets_the_headroom_of_the_gate(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, int] | None
) -> None:
    names = (MINIMUM_VARIABLE, OVERHEAD_VARIABLE, DIRECTORY_VARIABLE)
    use_fake_child(monkeypatch, f"print([os.environ[name] for name in {names}], file=sys.stderr)")
    book = ReservationBook(tmp_path / "book")
    minimum_bytes, overhead_bytes = numbers or (None, None)
    gate = MemoryGate(
        measure=free(2**40),
        reservations=book,
        minimum_bytes=minimum_bytes,
        overhead_bytes=overhead_bytes,
    )
    with RunnerProcess(model, gate=gate, env={OVERHEAD_VARIABLE: "9"}) as runner:
        pass
    told = ["5", "6"] if numbers else [str(MINIMUM_BYTES), "9"]
    assert ProcessView.of(runner).stderr_tail[0] == str([*told, str(tmp_path / "book")])


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a model of 1 GiB as stored, 2 GiB as float32, for a machine without a GPU."""
    use_fake_child(monkeypatch)
    monkeypatch.setattr("runner_client.memory.estimation.installed_backend", lambda: "cpu")
    return str(write_model(tmp_path / "half", weight_bytes=2**30, dtype="F16"))


def gate_for(need: MemoryEstimate) -> MemoryGate:
    """Return a gate with just enough free memory for this need."""
    free_bytes = need.required_bytes + MINIMUM_BYTES
    return MemoryGate(measure=free(free_bytes), settle_seconds=0)


@pytest.mark.parametrize("require_full", [False, True])
def test_auto_is_refused_where_it_fits_only_as_stored(half: str, require_full: bool) -> None:
    gate = gate_for(estimate(half, dtype="as_stored"))
    kind = errors.LoadRequiresFullError if require_full else errors.InsufficientMemoryError
    runner = RunnerProcess(half, gate=gate, require_full=require_full)
    with pytest.raises(errors.InsufficientMemoryError) as caught:
        runner.load()
    assert type(caught.value) is kind
    assert caught.value.required_bytes == estimate(half, dtype="float32").required_bytes
    for way_out in ('"auto_or_stored"', '"as_stored"', "evict another runner"):
        assert way_out in str(caught.value)
    assert runner.pid is None


@pytest.mark.parametrize(
    ("free_bytes", "overhead"), [(2**29, ""), (2**40, str(2**41))], ids=["memory", "overhead"]
)
def test_the_stored_format_is_not_advised_where_it_does_not_fit(
    half: str, free_bytes: int, overhead: str
) -> None:
    gate = MemoryGate(
        measure=free(free_bytes), settle_seconds=0, environ={OVERHEAD_VARIABLE: overhead}
    )
    with pytest.raises(errors.InsufficientMemoryError) as caught:
        RunnerProcess(half, gate=gate, env={OVERHEAD_VARIABLE: overhead}).load()
    assert caught.value.required_bytes == estimate(half, dtype="float32").required_bytes
    assert "As stored" not in str(caught.value)
    assert (OVERHEAD_VARIABLE in str(caught.value)) == bool(overhead)


@pytest.mark.usefixtures("fake_child")
def test_a_model_stored_as_float32_gets_no_advice_on_dtype(model: str) -> None:
    gate = MemoryGate(measure=free(2**20), settle_seconds=0)
    with pytest.raises(errors.InsufficientMemoryError) as caught:
        RunnerProcess(model, gate=gate).load()
    assert "auto_or_stored" not in str(caught.value)


def test_auto_or_stored_is_float32_where_it_fits(
    half: str, caplog: pytest.LogCaptureFixture
) -> None:
    gate = gate_for(estimate(half, dtype="float32"))
    with RunnerProcess(half, gate=gate, dtype="auto_or_stored") as runner:
        assert runner.estimate is not None
        assert runner.estimate.dtype == "float32"
    assert "dtype: DTYPE_AUTO_OR_STORED" in load_request_of(runner)
    assert "as it is stored" not in caplog.text


def test_auto_or_stored_falls_back_and_logs_it(half: str, caplog: pytest.LogCaptureFixture) -> None:
    gate = gate_for(estimate(half, dtype="as_stored"))
    with RunnerProcess(half, gate=gate, dtype="auto_or_stored") as runner:
        assert runner.estimate is not None
        assert runner.estimate.dtype == "as_stored"
    told = load_request_of(runner)
    assert "dtype: DTYPE_AUTO_OR_STORED" in told
    assert "memory_override" not in told
    assert "Loading it as stored" in caplog.text


def test_a_fallback_by_the_server_is_logged(
    half: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    use_fake_child(monkeypatch, "runner.dtype_fallback = True")
    gate = MemoryGate(measure=free(2**40))
    runner = RunnerProcess(half, gate=gate, dtype="auto_or_stored")
    try:
        runner.load()
        assert runner.wait_until_running().model.dtype_fallback
        status = runner.status()
        assert status.model is not None
        assert status.model.dtype_fallback
    finally:
        runner.close()
    assert "held as stored, which is slow on a CPU: not enough memory" in caplog.text


def test_auto_or_stored_does_not_fall_back_with_require_full(half: str) -> None:
    gate = gate_for(estimate(half, dtype="as_stored"))
    runner = RunnerProcess(half, gate=gate, dtype="auto_or_stored", require_full=True)
    with pytest.raises(errors.LoadRequiresFullError) as caught:
        runner.load()
    assert caught.value.required_bytes == estimate(half, dtype="float32").required_bytes


def test_auto_or_stored_that_does_not_fit_at_all_names_the_smallest_need(half: str) -> None:
    gate = MemoryGate(measure=free(2**30), settle_seconds=0)
    with pytest.raises(errors.InsufficientMemoryError) as caught:
        RunnerProcess(half, gate=gate, dtype="auto_or_stored").load()
    assert caught.value.required_bytes == estimate(half, dtype="as_stored").required_bytes


@pytest.mark.usefixtures("fake_child")
@pytest.mark.parametrize("free_bytes", [2**20, 2**28], ids=["less than the need", "kept back"])
def test_an_overridden_gate_overrides_the_server_too(model: str, free_bytes: int) -> None:
    gate = MemoryGate(measure=free(free_bytes), minimum_bytes=2**28, settle_seconds=0)
    with RunnerProcess(model, gate=gate, dtype="bfloat16", memory_override=True) as runner:
        pass
    told = load_request_of(runner)
    assert "memory_override: true" in told
    assert "memory_limit_bytes" not in told


@pytest.mark.usefixtures("fake_child")
def test_an_unneeded_override_is_not_sent(model: str) -> None:
    gate = MemoryGate(measure=free(2**40))
    with RunnerProcess(model, gate=gate, memory_override=True) as runner:
        pass
    assert "memory_override" not in load_request_of(runner)


@pytest.mark.parametrize("fits_as_stored", [True, False])
def test_auto_or_stored_prefers_the_stored_format_to_an_override(
    half: str, fits_as_stored: bool
) -> None:
    gate = gate_for(estimate(half, dtype="as_stored"))
    if not fits_as_stored:
        gate = MemoryGate(measure=free(2**30), settle_seconds=0)
    runner = RunnerProcess(half, gate=gate, dtype="auto_or_stored", memory_override=True)
    with runner:
        assert runner.estimate is not None
        assert runner.estimate.dtype == "as_stored"
    assert ("memory_override: true" in load_request_of(runner)) == (not fits_as_stored)


def test_auto_stays_float32_when_overridden(half: str) -> None:
    gate = gate_for(estimate(half, dtype="as_stored"))
    with RunnerProcess(half, gate=gate, memory_override=True) as runner:
        assert runner.estimate is not None
        assert runner.estimate.dtype == "float32"
    told = load_request_of(runner)
    assert "dtype: DTYPE_AUTO\\n" in told
    assert "memory_override: true" in told


@pytest.mark.usefixtures("fake_child")
def test_every_load_option_reaches_the_child(model: str) -> None:
    options = LoadOptions(memory_limit_bytes=2**40, prefix_cache_bytes=0, allow_inexact=True)
    with RunnerProcess(model, options=options, parallel=2, context_length=64) as runner:
        pass
    told = load_request_of(runner)
    for field in (
        *("memory_limit_bytes: 1099511627776", "prefix_cache_bytes: 0", "allow_inexact: true"),
        *("parallel: 2", "context_length: 64"),
    ):
        assert field in told


def test_a_limit_too_low_for_every_format_names_the_need_of_the_one_in_use(
    half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(
        model: str, *, options: LoadOptions, env: dict[str, str], blas: str
    ) -> MemoryEstimate:
        assert model == half
        assert env
        assert blas == "auto"
        raise errors.InsufficientMemoryError(f"the need as {options.dtype}", required_bytes=2)

    monkeypatch.setattr("runner_client.process.launch.estimate", limited)
    with pytest.raises(errors.InsufficientMemoryError, match=r"the need as auto$"):
        RunnerProcess(half, memory_limit_bytes=1).load()


def test_auto_or_stored_falls_back_where_the_limit_is_below_float32(
    half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(model: str, *, options: LoadOptions, **others: Any) -> MemoryEstimate:
        if options.dtype != "as_stored":
            raise errors.InsufficientMemoryError("over the limit", required_bytes=2**40)
        return estimate(model, options=options, **others)

    monkeypatch.setattr("runner_client.process.launch.estimate", limited)
    gate = MemoryGate(measure=free(2**40))
    with RunnerProcess(half, gate=gate, dtype="auto_or_stored") as runner:
        assert runner.estimate is not None
        assert runner.estimate.dtype == "as_stored"
    with pytest.raises(errors.InsufficientMemoryError, match="over the limit"):
        RunnerProcess(half, gate=gate).load()
