"""Ranks end together after the death of one, a signal or the launcher's end."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.rank_processes import DEMO, Ranks, completion, failure_of, problem_of, ranks
from support.server_child import DEADLINE_SECONDS
from support.sweeps import sampled

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = pytest.mark.mlx

PROMISED_SECONDS = 5.0
"""From a death to the end of all ranks, on a machine with other work to do."""

PROMPT = [7 * i % 2000 + 5 for i in range(900)]


Wait = Callable[[], object]
"""Waits for a call and returns its result.

``result()`` of a stream would wait until the deadline if a message came before the error: gRPC ends
a stream once all its messages are read.
"""


def idle(started: Ranks, _model: Path) -> Wait | None:
    """Leave the ranks without a model."""
    started.first.status()
    return None


def loading(started: Ranks, model: Path) -> Wait:
    """Start a load and return in the middle."""
    first = started.first
    call = first.stub.Load.future(pb.LoadRequest(model=str(model)), timeout=DEADLINE_SECONDS)
    first.wait_for(lambda: first.status().progress > 1)
    return call.result


def prefill(started: Ranks, _model: Path) -> Wait:
    """Start a completion and return in the middle of the prompt."""
    started.first.load(DEMO)
    request = completion(PROMPT, num_predict=100)
    call = started.first.stub.Completion(request, timeout=DEADLINE_SECONDS)
    assert next(call).HasField("prompt_progress")
    return partial(list, call)


def decode(started: Ranks, _model: Path) -> Wait:
    """Start a completion and return after the first tokens."""
    started.first.load(DEMO)
    call = started.first.complete(900)
    while not next(call).token_ids:
        pass
    return partial(list, call)


Phase = Callable[[Ranks, Path], Wait | None]


@pytest.mark.parametrize(
    ("size", "victim", "phase"),
    sampled(
        [
            (2, 1, idle),
            (2, 1, loading),
            (2, 1, prefill),
            (2, 1, decode),
            (2, 0, decode),
            (3, 2, idle),
        ],
        [(2, 1, loading), (2, 1, prefill), (2, 1, decode), (2, 0, decode), (3, 2, idle)],
    ),
)
def test_the_death_of_one_rank_ends_all(
    tmp_path: Path, deep: Path, size: int, victim: int, phase: Phase
) -> None:
    with ranks(tmp_path, size) as started:
        wait = phase(started, deep)
        began = time.monotonic()
        started.processes[victim].kill()
        if wait is not None:
            error = failure_of(wait)
            assert error.code() == grpc.StatusCode.UNAVAILABLE
            # After the death of rank 0 the caller sees only the broken connection.
            if victim:
                reason, text = problem_of(error)
                assert reason == "SHUTTING_DOWN", started.log()
                assert f"rank {victim} (process {started.processes[victim].pid} on" in text
        codes = started.wait()
        took = time.monotonic() - began
        assert codes.pop(victim) == -signal.SIGKILL
        assert set(codes) == {70}, started.log()
        assert took < PROMISED_SECONDS


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGTERM), (1, signal.SIGINT)])
def test_a_signal_to_any_rank_stops_all_in_order(
    tmp_path: Path, rank: int, number: signal.Signals
) -> None:
    with ranks(tmp_path, 2) as started:
        wait = decode(started, DEMO)
        started.processes[rank].send_signal(number)
        assert problem_of(failure_of(wait))[0] == "SHUTTING_DOWN"
        assert started.wait() == [0, 0], started.log()


def test_the_launchers_end_stops_all_ranks(tmp_path: Path) -> None:
    with ranks(tmp_path, 2) as started:
        first = started.first
        # A server that is importing MLX when its parent ends may need longer than the guard allows.
        first.wait_for(lambda: bool(first.status().device))
        pipe = first.process.stdin
        assert pipe
        pipe.close()
        assert started.wait() == [0, 0], started.log()
