"""CPU time of an idle runner."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from grpc_health.v1 import health_pb2

from support.server_child import Child, running

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = pytest.mark.mlx

Build = Callable[..., Path]
IDLE_SECONDS = 2.0
WINDOWS = 3
MOST_OF_A_CORE = 0.01


def _cpu_seconds(child: Child) -> float:
    """Return the CPU seconds used by the threads of the process since the start."""
    times = psutil.Process(child.process.pid).cpu_times()
    return times.user + times.system


def _is_idle(child: Child) -> bool:
    """Return whether the process uses nearly no CPU time in one of some windows.

    In the first window the server frees memory once: 30 ms on a busy machine.
    """
    return any(_share(child) < MOST_OF_A_CORE for _ in range(WINDOWS))


def _share(child: Child) -> float:
    before, began = _cpu_seconds(child), time.monotonic()
    time.sleep(IDLE_SECONDS)
    return (_cpu_seconds(child) - before) / (time.monotonic() - began)


def _watch_health(child: Child) -> None:
    """Open a health stream and leave the stream open, as hosts do."""
    watch = child.channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    call = watch(health_pb2.HealthCheckRequest())
    child.calls.append(call)
    next(call)


def test_a_runner_is_idle_after_completions(tmp_path: Path, model_dir: Build) -> None:
    with running(tmp_path) as child:
        child.load(model_dir())
        _watch_health(child)
        # The last completion is cancelled midway.
        for count in (20, 20, 1500):
            call = child.complete(count)
            read = 0
            while read < 20:
                read += len(next(call).token_ids)
        call.cancel()  # type: ignore[attr-defined]  # it is a call
        child.wait_for(lambda: not child.status().running_count)
        assert _is_idle(child)
        # The engine still wakes up for new work.
        assert next(child.complete(5))


def test_a_runner_without_a_model_is_idle(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        child.wait_for(lambda: bool(child.status().device))
        assert _is_idle(child)
