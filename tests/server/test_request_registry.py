"""The request registry, driven by a single thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

import pytest

from runner_server.engine.backend import ModelHandle
from runner_server.engine.commands import Load, Unload
from runner_server.engine.drain import Drain
from runner_server.engine.faults import stopping_fault
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.request_registry import RequestRegistry
from runner_server.engine.types import CompletionSpec, EngineState, LoadSpec, State
from runner_server.errors import Busy, ShuttingDown
from support.fakes import ByteCodec, FakeGrammars, model_info


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


def test_every_change_of_the_state_is_notified_after_it_happened() -> None:
    seen: list[EngineState] = []
    registry = RequestRegistry(max_queued=1, on_change=lambda: seen.append(registry.state()))
    handle = ModelHandle(
        replace(model_info(), kv_budget_bytes=1 << 20),
        ByteCodec(),
        FakeGrammars(),
        lambda tokens: tokens,
        "m",
    )
    request = GenerationRequest(CompletionSpec((1,), 1), ByteCodec(), frozenset())

    drains: list[Drain] = []

    def admit() -> None:
        request.admit()
        registry.note_admission()

    changes: list[tuple[Callable[[], object], dict[str, object]]] = [
        (lambda: registry.begin_command(Load(LoadSpec("m"))), {"state": State.LOADING}),
        (lambda: registry.note_progress(40), {"progress": 40}),
        (lambda: registry.note_error("no"), {"last_error": "no"}),
        (lambda: registry.offer_model(handle), {"model": handle.info}),
        (registry.end_command, {"state": State.ACTIVE, "progress": 100}),
        (lambda: registry.accept(handle, request), {"queued_count": 1, "running_count": 0}),
        (admit, {"queued_count": 0, "running_count": 1}),
        (lambda: registry.remove(request), {"running_count": 0}),
        (lambda: drains.append(registry.begin_drain()), {"state": State.DRAINING}),
        (lambda: registry.end_drain(drains[0], is_drained=False), {"state": State.ACTIVE}),
        (registry.withdraw_model, {"model": None}),
        (registry.stop, {"state": State.STOPPING}),
        (lambda: registry.die("dead"), {"state": State.FAILED, "last_error": "dead"}),
    ]
    for change, expected in changes:
        seen.clear()
        change()
        assert seen, expected
        assert {name: getattr(seen[-1], name) for name in expected} == expected
