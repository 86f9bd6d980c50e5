"""RunnerPool: an AsyncRunnerPool used from threads."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from runner_client import ModelState, PoolSettings, RunnerPool, errors
from support.fake_child import open_files, wait_until
from support.pool_machine import ONE, Machine

LIMIT_SECONDS = 10.0


@contextlib.contextmanager
def pool_on(machine: Machine, **settings: Any) -> Iterator[RunnerPool]:
    """Open a pool on a machine, and check that its thread ends."""
    given = PoolSettings(min_residence_seconds=0.0, **settings)
    with RunnerPool(given, gate=machine.gate()) as pool:
        yield pool
    assert "runner-pool" not in {each.name for each in threading.enumerate()}
    assert machine.held_bytes == 0


def state_of(pool: RunnerPool, model: str) -> ModelState:
    """Return the state of a model, requested or not."""
    found = pool.status().model(model)
    return found.state if found else ModelState.ABSENT


@contextlib.contextmanager
def interrupted_when(is_true: Callable[[], bool]) -> Iterator[None]:
    """Interrupt the main thread once ``is_true`` returns True."""
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_until(is_true)
        # Let the main thread block.
        time.sleep(0.05)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def load_forever(machine: Machine, model: str) -> None:
    """Let the next load of a model never end."""
    machine.of(model).loads.append(asyncio.Event())


def test_threads_share_a_runner_and_its_client(machine: Machine) -> None:
    model, other = machine.model("a"), machine.model("b")
    together = threading.Barrier(5)

    def lease(_: int) -> int:
        with pool.runner(model) as client:
            together.wait(LIMIT_SECONDS)
            return id(client)

    with pool_on(machine, budget_bytes=ONE) as pool, ThreadPoolExecutor(5) as threads:
        assert len(set(threads.map(lease, range(5)))) == 1
        assert len(machine.processes) == 1
        assert pool.load(other).state is ModelState.READY
        assert state_of(pool, model) is ModelState.ABSENT
        with pytest.raises(errors.InsufficientMemoryError, match="would have to go"):
            pool.load(model, evict=False)
        pool.pin(other)
        with pytest.raises(errors.InsufficientMemoryError, match="pinned"):
            pool.load(model)
        pool.unpin(other)
        with pool.runner(other), pytest.raises(errors.BusyError, match="used by 1"):
            pool.evict(other)
        # The lease is over once the block is left.
        assert pool.evict(other).is_complete
        assert [each.name for each in pool.models()] == [model, other]


def test_a_pool_is_used_only_while_it_is_open(machine: Machine) -> None:
    model = machine.model("a")
    pool = RunnerPool(gate=machine.gate())
    calls: list[Callable[[], object]] = [
        lambda: pool.load(model),
        lambda: pool.runner(model).__enter__(),
        lambda: pool.evict(model),
        lambda: pool.pin(model),
        pool.status,
        lambda: next(pool.watch()),
    ]
    pool.close()
    for call in calls:
        with pytest.raises(errors.RunnerUnavailableError, match="not open"):
            call()
    with pool:
        pool.load(model)
        with pytest.raises(errors.RunnerUnavailableError, match="entered once"):
            pool.__enter__()
    for call in calls[:-1]:
        with pytest.raises(errors.RunnerUnavailableError, match="not open"):
            call()
    assert list(pool.watch()) == []
    with pytest.raises(errors.RunnerUnavailableError, match="entered once"):
        pool.__enter__()
    pool.close()


def test_an_error_of_the_caller_ends_the_lease(machine: Machine) -> None:
    model = machine.model("a")
    with pool_on(machine) as pool:
        with pytest.raises(ArithmeticError), pool.runner(model):
            raise ArithmeticError
        assert pool.models()[0].leases == 0
        with pytest.raises(errors.ModelNotFoundError), pool.runner("/nowhere"):
            pass
        with pytest.raises(TypeError, match=r"^evict is "):
            pool.load(model, evict="no")  # type: ignore[arg-type]  # the point


def test_a_close_from_another_thread_ends_waiting_ones(machine: Machine) -> None:
    model, loaded = machine.model("a"), machine.model("b")
    load_forever(machine, model)

    def lease() -> None:
        with pool.runner(model):
            pytest.fail("the model is never loaded")

    with pool_on(machine) as pool, ThreadPoolExecutor(3) as threads, pool.runner(loaded):
        waiting: list[Any] = [threads.submit(lease), threads.submit(pool.load, model)]
        waiting.append(threads.submit(list, pool.watch()))
        wait_until(lambda: state_of(pool, model) is ModelState.LOADING)
        closing = [threading.Thread(target=pool.close) for _ in range(2)]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join(LIMIT_SECONDS)
            assert not thread.is_alive()
        for future in waiting[:2]:
            error = future.exception(LIMIT_SECONDS)
            assert type(error) is errors.RunnerUnavailableError
        assert waiting[2].result(LIMIT_SECONDS)


def test_no_call_hangs_while_the_pool_closes(machine: Machine) -> None:
    """Calls that come at the very end of the pool's event loop are answered."""
    model = machine.model("a")

    def call_until_closed() -> int:
        for number in range(10**6):
            try:
                with pool.runner(model):
                    pool.status()
            except errors.RunnerUnavailableError:
                return number
        return -1

    for _ in range(5):
        with ThreadPoolExecutor(4) as threads:
            with pool_on(machine) as pool:
                pool.load(model)
                calling = [threads.submit(call_until_closed) for _ in range(4)]
                time.sleep(0.02)
            assert min(each.result(LIMIT_SECONDS) for each in calling) >= 0


def test_an_interrupt_ends_the_wait_for_a_lease(machine: Machine) -> None:
    model = machine.model("a")
    with pool_on(machine) as pool:
        for enter in (lambda: pool.runner(model).__enter__(), lambda: pool.load(model)):
            load_forever(machine, model)
            with (
                pytest.raises(KeyboardInterrupt),
                interrupted_when(lambda: state_of(pool, model) is ModelState.LOADING),
            ):
                enter()
            wait_until(lambda: state_of(pool, model) is ModelState.ABSENT)
        with pool.runner(model):
            pass


def close_slowly(machine: Machine, model: str) -> None:
    """Close a pool whose runner does not stop."""
    with pool_on(machine) as pool:
        pool.load(model)
        machine.of(model).may_stop.clear()


def test_an_interrupt_during_the_close_kills_the_runners(machine: Machine) -> None:
    model = machine.model("a")
    with (
        pytest.raises(KeyboardInterrupt),
        interrupted_when(lambda: any(each.is_stopping for each in machine.processes)),
    ):
        close_slowly(machine, model)
    assert machine.held_bytes == 0
    assert "runner-pool" not in {each.name for each in threading.enumerate()}


def test_watching_ends_with_the_generator_or_the_pool(machine: Machine) -> None:
    model = machine.model("a")
    with pool_on(machine) as pool:
        early, open_at_close = pool.watch(), pool.watch()
        assert next(early).models == ()
        assert next(open_at_close).models == ()
        pool.load(model)
        assert next(early).models[0].name == model
        early.close()  # type: ignore[attr-defined]  # it is a generator
        pool._call(asyncio.sleep(0))
        assert len(pool._pool._manager._watchers) == 1
    assert list(open_at_close) == []
    open_at_close.close()  # type: ignore[attr-defined]  # it is a generator


def test_an_interrupt_ends_watching(machine: Machine) -> None:
    with pool_on(machine) as pool:
        states = pool.watch()
        next(states)
        with pytest.raises(KeyboardInterrupt), interrupted_when(lambda: True):
            next(states)
        assert list(states) == []
        assert not pool._pool._manager._watchers


def test_a_pool_leaves_no_descriptor(machine: Machine) -> None:
    model = machine.model("a")

    def use() -> None:
        with pool_on(machine) as pool, pool.runner(model):
            pass

    use()
    before = open_files()
    for _ in range(3):
        use()
    wait_until(lambda: open_files() <= before)


def test_a_pool_whose_thread_cannot_start_its_loop_says_why(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise OSError("too many open files")

    monkeypatch.setattr(asyncio, "new_event_loop", fail)
    monkeypatch.setattr("asyncio.events.new_event_loop", fail)
    pool = RunnerPool(gate=machine.gate())
    with pytest.raises(OSError, match="too many open files"):
        pool.__enter__()
    with pytest.raises(errors.RunnerUnavailableError, match="not open"):
        pool.status()
