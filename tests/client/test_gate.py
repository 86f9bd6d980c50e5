"""The memory gate: the need against free memory, with the figures in every refusal."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from runner_client.errors import (
    InsufficientMemoryError,
    InvalidRequestError,
    LoadRequiresFullError,
)
from runner_client.memory.estimation import MemoryEstimate
from runner_client.memory.gate import (
    METAL_MINIMUM_BYTES,
    MINIMUM_BYTES,
    MINIMUM_VARIABLE,
    OVERHEAD_VARIABLE,
    GateDecision,
    MemoryGate,
)
from runner_common.host_memory.free import FreeMemory
from runner_common.memory.reservations import DIRECTORY_VARIABLE, ReservationBook

GIB = 1024**3


@pytest.fixture(autouse=True)
def _no_other_runners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "reservations"))


def need(total_bytes: int) -> MemoryEstimate:
    """Return an estimate of ``total_bytes``, three quarters of them weights."""
    return MemoryEstimate(
        model="org/name",
        path="/models/name",
        backend="cpu",
        dtype="float32",
        context_length=4096,
        model_context_length=8192,
        parallel=2,
        file_bytes=total_bytes // 2,
        weight_bytes=total_bytes - total_bytes // 4,
        kv_bytes=total_bytes // 4,
        working_bytes=0,
        process_bytes=0,
        load_transient_bytes=0,
    )


def free(available_bytes: int, **overrides: Any) -> FreeMemory:
    values = {
        "available_bytes": available_bytes,
        "source": "cgroup",
        "system_bytes": 64 * GIB,
        "cgroup_bytes": available_bytes,
        "device_bytes": None,
        "device_name": "Some CPU",
        "device_kind": "cpu",
    }
    return FreeMemory(**{**values, **overrides})


def gate(*measured: int, **kwargs: Any) -> MemoryGate:
    """Return a gate that measures these figures in turn and then repeats the last."""
    figures = _repeat_last(measured)
    settings = {"minimum_bytes": 0, "settle_seconds": 0.0, "environ": {}, **kwargs}
    settings.setdefault("reservations", ReservationBook())
    return MemoryGate(measure=lambda: free(next(figures)), **settings)


def _repeat_last(figures: Iterable[int]) -> Iterator[int]:
    figure = 0
    for figure in figures:
        yield figure
    while True:
        yield figure


def test_a_need_up_to_the_free_memory_is_admitted() -> None:
    decision = gate(10 * GIB).check(need(10 * GIB))
    assert decision.fits
    assert not decision.overridden
    assert (decision.required_bytes, decision.available_bytes) == (10 * GIB, 10 * GIB)


def test_an_oversized_prefix_cache_is_named() -> None:
    asked = replace(need(2 * GIB), prefix_cache_bytes=9 * GIB)
    with pytest.raises(InsufficientMemoryError) as caught:
        gate(10 * GIB).check(asked)
    assert "requires 11.0 GiB, most of it prefix cache (9.0 GiB)" in str(caught.value)
    assert "lower prefix_cache_bytes or context_length" in str(caught.value)
    with pytest.raises(InsufficientMemoryError) as caught:
        gate(1 * GIB).check(need(2 * GIB))
    assert "prefix" not in str(caught.value)


def test_one_byte_too_many_is_refused() -> None:
    with pytest.raises(InsufficientMemoryError) as caught:
        gate(10 * GIB).check(need(10 * GIB + 1))
    assert caught.value.required_bytes == 10 * GIB + 1
    assert caught.value.available_bytes == 10 * GIB


def test_minimum_and_overhead_are_kept_free() -> None:
    narrow = gate(10 * GIB, minimum_bytes=1 * GIB, overhead_bytes=2 * GIB)
    assert narrow.check(need(7 * GIB)).overhead_bytes == 3 * GIB
    with pytest.raises(InsufficientMemoryError) as caught:
        narrow.check(need(7 * GIB + 1))
    assert caught.value.overhead_bytes == 3 * GIB


def test_an_overhead_above_the_free_memory_leaves_nothing() -> None:
    with pytest.raises(InsufficientMemoryError) as caught:
        gate(1 * GIB, overhead_bytes=2 * GIB).check(need(1))
    assert caught.value.available_bytes == 0


def test_the_overhead_comes_from_the_environment() -> None:
    for size in (f" {4 * GIB}\n", "4GiB"):
        limited = gate(10 * GIB, environ={OVERHEAD_VARIABLE: size})
        assert limited.check(need(6 * GIB)).overhead_bytes == 4 * GIB
    explicit = gate(10 * GIB, environ={OVERHEAD_VARIABLE: "broken"}, overhead_bytes=0)
    assert explicit.check(need(10 * GIB)).overhead_bytes == 0


def test_the_minimum_comes_from_the_environment_too() -> None:
    environ = {MINIMUM_VARIABLE: str(3 * GIB), OVERHEAD_VARIABLE: str(GIB)}
    assert gate(10 * GIB, minimum_bytes=None, environ=environ).check(need(6 * GIB)).fits
    assert gate(10 * GIB, environ=environ).check(need(1)).overhead_bytes == GIB


@pytest.mark.parametrize("text", ["4 apples", "-1", "1.5", "0x10", "²", "9" * 5000])
@pytest.mark.parametrize("variable", [OVERHEAD_VARIABLE, MINIMUM_VARIABLE])
def test_an_invalid_overhead_names_the_variable(variable: str, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=variable) as caught:
        gate(GIB, minimum_bytes=None, environ={variable: text})
    assert [field for field, _ in caught.value.field_violations] == [variable]


@pytest.mark.parametrize(
    ("kind", "minimum"),
    [("metal", METAL_MINIMUM_BYTES), ("cuda", MINIMUM_BYTES), ("cpu", MINIMUM_BYTES)],
)
def test_the_minimum_depends_on_the_device(kind: str, minimum: int) -> None:
    measured = MemoryGate(
        measure=lambda: free(GIB, device_kind=kind), environ={}, reservations=ReservationBook()
    )
    assert measured.check(need(1)).overhead_bytes == minimum


def test_memory_that_frees_late_is_measured_again() -> None:
    assert gate(1 * GIB, 10 * GIB).check(need(9 * GIB)).fits


def test_memory_is_measured_twice_and_no_more() -> None:
    with pytest.raises(InsufficientMemoryError):
        gate(1 * GIB, 2 * GIB, 10 * GIB).check(need(9 * GIB))


def test_require_full_selects_the_error() -> None:
    with pytest.raises(LoadRequiresFullError):
        gate(GIB).check(need(2 * GIB), require_full=True)
    with pytest.raises(InsufficientMemoryError) as caught:
        gate(GIB).check(need(2 * GIB))
    assert type(caught.value) is InsufficientMemoryError


def test_an_override_admits_and_is_recorded() -> None:
    decision = gate(GIB).check(need(2 * GIB), override=True)
    assert decision.overridden
    assert not decision.fits
    assert not gate(GIB).check(need(1), override=True).overridden


def test_a_refusal_names_need_free_overhead_and_largest_part() -> None:
    with pytest.raises(InsufficientMemoryError) as caught:
        gate(6 * GIB, overhead_bytes=GIB // 2).check(need(8 * GIB))
    assert str(caught.value) == (
        "org/name requires 8.0 GiB, most of it weights (6.0 GiB), but only 5.5 GiB are available: "
        "6.0 GiB free on Some CPU (limited by the control group), less 512.0 MiB overhead. Stop "
        "another process, use a smaller model, or override the gate with memory_override"
    )


def refusal(gate: MemoryGate, estimate: MemoryEstimate) -> str:
    with pytest.raises(InsufficientMemoryError) as caught:
        gate.check(estimate)
    return str(caught.value).partition(" overhead")[2]


def test_smaller_options_are_advised_where_they_can_help() -> None:
    several = need(8 * GIB)
    text = refusal(gate(7 * GIB), several)
    assert "lower context_length (4096) or parallel (2), use a smaller model" in text
    text = refusal(gate(7 * GIB), replace(several, parallel=1))
    assert "lower context_length (4096), use a smaller model" in text
    assert "lower" not in refusal(gate(5 * GIB), several)


def test_no_smaller_model_is_advised_where_nothing_is_available() -> None:
    text = refusal(gate(GIB, minimum_bytes=GIB), need(8 * GIB))
    assert text == ". Stop another process, or override the gate with memory_override"


def test_a_prefix_cache_that_is_the_whole_problem_is_the_advice() -> None:
    huge = replace(need(2 * GIB), kv_bytes=0, prefix_cache_bytes=2**50)
    assert "lower prefix_cache_bytes, use" in refusal(gate(10 * GIB), huge)


@pytest.mark.parametrize(
    ("minimum", "overhead", "advice"),
    [
        (None, "30GiB", f". Lower {OVERHEAD_VARIABLE} (30.0 GiB), stop another process"),
        ("30GiB", None, f". Lower {MINIMUM_VARIABLE} (30.0 GiB), stop another process"),
        ("9GiB", "9GiB", f". Lower {OVERHEAD_VARIABLE} and {MINIMUM_VARIABLE}, stop another"),
        (None, "1GiB", ". Stop another process, lower"),
    ],
)
def test_the_variable_that_keeps_the_memory_free_is_named(
    minimum: str | None, overhead: str | None, advice: str
) -> None:
    environ = {MINIMUM_VARIABLE: minimum or "", OVERHEAD_VARIABLE: overhead or ""}
    limited = gate(10 * GIB, minimum_bytes=None, environ=environ)
    wanted = need(12 * GIB if overhead == "1GiB" else 8 * GIB)
    if overhead == "1GiB":
        limited = gate(12 * GIB, minimum_bytes=None, environ=environ)
    assert refusal(limited, wanted).startswith(advice)


def test_reserved_memory_is_not_available_to_others() -> None:
    shared = gate(10 * GIB)
    with shared.reserve(need(6 * GIB)):
        with pytest.raises(
            InsufficientMemoryError, match=r"and 6\.0 GiB that 1 other runner may still take"
        ):
            shared.check(need(5 * GIB))
        assert shared.check(need(4 * GIB)).reserved_bytes == 6 * GIB
    assert shared.check(need(10 * GIB)).reserved_bytes == 0


def test_a_failing_start_ends_its_reservation() -> None:
    shared = gate(10 * GIB)
    with pytest.raises(RuntimeError), shared.reserve(need(6 * GIB)):
        raise RuntimeError
    assert shared.check(need(10 * GIB)).fits


def test_a_refused_need_reserves_nothing() -> None:
    shared = gate(10 * GIB)
    with pytest.raises(InsufficientMemoryError), shared.reserve(need(11 * GIB)):
        pytest.fail("the block ran")
    assert shared.check(need(10 * GIB)).reserved_bytes == 0


def test_an_overridden_need_is_reserved_too() -> None:
    shared = gate(10 * GIB)
    with shared.reserve(need(11 * GIB), override=True), pytest.raises(InsufficientMemoryError):
        shared.check(need(1))


def test_concurrent_threads_never_overcommit() -> None:
    shared = gate(10 * GIB)
    begin, inside = threading.Barrier(8), threading.Barrier(3)
    refused: list[InsufficientMemoryError] = []
    entered: list[int] = []

    def start(number: int) -> None:
        begin.wait(timeout=30)
        try:
            with shared.reserve(need(3 * GIB)):
                entered.append(number)
                # Three fit; none leaves before all three have entered.
                inside.wait(timeout=30)
                done.wait(timeout=30)
        except InsufficientMemoryError as error:
            refused.append(error)
            if len(refused) == 5:
                done.set()

    done = threading.Event()
    threads = [threading.Thread(target=start, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert (len(entered), len(refused)) == (3, 5)


def test_the_default_gate_measures_this_machine() -> None:
    assert MemoryGate().check(need(1)).free.available_bytes > 0


def test_a_refusal_counts_the_runners_that_reserved() -> None:
    with (
        gate(10 * GIB).reserve(need(3 * GIB)),
        gate(10 * GIB).reserve(replace(need(4 * GIB), path="/models/other")) as other,
    ):
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            other.assign(child.pid)
            with pytest.raises(InsufficientMemoryError, match="that 2 other runners may") as caught:
                gate(10 * GIB).check(need(4 * GIB))
            child.communicate(b"\n")
        assert caught.value.available_bytes is not None
        # The claim of the assigned runner shrinks by the memory of its process.
        assert 3 * GIB < caught.value.available_bytes < 3 * GIB + 2**25
        assert "Stop another runner or process" in str(caught.value)


def test_an_assigned_reservation_lasts_until_its_process_ends() -> None:
    shared = gate(10 * GIB)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        with shared.reserve(need(6 * GIB)) as admission:
            admission.assign(child.pid)
        assert 5 * GIB < shared.check(need(1)).reserved_bytes < 6 * GIB
        child.communicate(b"\n")
    assert shared.check(need(1)).reserved_bytes == 0


def test_a_default_prefix_cache_is_not_required_and_reserved_only_if_it_fits() -> None:
    asked = replace(need(8 * GIB), prefix_cache_bytes=4 * GIB, has_default_prefix_cache=True)
    for free_bytes, reserved in ((8 * GIB, 8 * GIB), (10 * GIB, 10 * GIB), (99 * GIB, 12 * GIB)):
        shared = gate(free_bytes)
        with shared.reserve(asked) as admission:
            assert admission.required_bytes == 8 * GIB
            assert shared.check(need(0)).reserved_bytes == reserved
    with pytest.raises(InsufficientMemoryError) as caught:
        gate(7 * GIB).check(asked)
    assert "prefix" not in str(caught.value)


def test_a_check_reserves_nothing() -> None:
    shared = gate(10 * GIB)
    decision = shared.check(need(8 * GIB))
    assert type(decision) is GateDecision
    assert asdict(decision)["reserved_bytes"] == 0
    assert shared.check(need(8 * GIB)).reserved_bytes == 0


def test_two_blocks_for_one_model_are_two_runners() -> None:
    shared = gate(10 * GIB)
    with shared.reserve(need(4 * GIB)), shared.reserve(need(4 * GIB)):
        assert shared.check(need(0)).reserved_bytes == 8 * GIB


def test_a_runner_started_in_the_block_takes_over_its_reservation() -> None:
    shared, starting = gate(10 * GIB), gate(10 * GIB)
    with shared.reserve(need(6 * GIB)) as outer:
        admission = starting.admit(need(6 * GIB))
        assert admission.reserved_bytes == 0
        assert shared.check(need(0)).reserved_bytes == 6 * GIB
        # Another start of the same model needs memory of its own.
        with pytest.raises(InsufficientMemoryError):
            starting.admit(need(6 * GIB))
        assert outer.reservation is not admission.reservation
    # The started runner owns the reservation now; leaving the block does not release it.
    assert shared.check(need(0)).reserved_bytes == 6 * GIB
    admission.reservation.release()
    assert shared.check(need(0)).reserved_bytes == 0
