"""The request registry, driven by a single thread."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial

import pytest

from runner_server.engine.commands import Load, Unload
from runner_server.engine.faults import stopping_fault
from runner_server.engine.request_registry import RequestRegistry
from runner_server.engine.types import LoadSpec, State
from runner_server.errors import Busy, ShuttingDown


def test_a_cancelled_load_can_be_failed_without_harm() -> None:
    registry = RequestRegistry(max_queued=1)
    load = Load(LoadSpec("m"))
    registry.begin_command(load)
    assert load.future.cancel()
    registry.fail_commands(stopping_fault())
    assert load.future.cancelled()


def test_only_one_load_or_unload_runs_at_a_time() -> None:
    registry = RequestRegistry(max_queued=1)
    registry.begin_command(Load(LoadSpec("m")))
    assert registry.state().state is State.LOADING
    for begin in (
        partial(registry.begin_command, Unload()),
        partial(registry.begin_trim, Future()),
    ):
        with pytest.raises(Busy):
            begin()
    registry.end_command()
    assert registry.state().state is State.IDLE
    unload = Unload()
    registry.begin_command(unload)
    assert registry.state().state is State.IDLE
    registry.fail_commands(stopping_fault())
    assert isinstance(unload.future.exception(0), ShuttingDown)


def test_the_last_error_is_bounded() -> None:
    registry = RequestRegistry(max_queued=1)
    registry.note_error("x" * 100_000)
    assert len(registry.state().last_error) == 512
    registry.die("y" * 100_000)
    assert len(registry.state().last_error) == 512
