"""Fault 5: stop signals in every phase, under load, and more than once.

tests/e2e/test_server_process.py stops servers that start, idle, load and decode.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import grpc
import psutil
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from support.server_child import DEADLINE_SECONDS, Child, running

pytestmark = pytest.mark.mlx

GRACE_SECONDS = 5.5
"""Upper bound of the server's drain time; the client's grace time is longer."""

SIGNALS = [signal.SIGINT, signal.SIGTERM]
CONTEXT = 32_000
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 << 10)]


def _load(child: Child, model: str, parallel: int = 4) -> None:
    request = pb.LoadRequest(model=model, parallel=parallel, context_length=CONTEXT)
    child.stub.Load(request, timeout=DEADLINE_SECONDS)


def _assert_stopped_in_time(child: Child, path: Path, began: float) -> None:
    assert child.wait() == 0, child.log.read_text()
    assert time.monotonic() - began < GRACE_SECONDS
    _assert_gone(child, path)


def _assert_gone(child: Child, path: Path) -> None:
    """Check for the end of the process, which frees the memory, and of the socket."""
    assert not psutil.pid_exists(child.process.pid)
    assert not path.exists()
    assert "Traceback" not in child.log.read_text()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_interrupts_prefill(
    tmp_path: Path, socket_dir: Path, model: str, number: signal.Signals
) -> None:
    path = socket_dir / "s"
    with running(tmp_path, "--listen", f"unix:{path}") as child:
        _load(child, model)
        request = pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[7] * (CONTEXT - 10)))
        call = child.stub.Completion(request, timeout=DEADLINE_SECONDS)
        first = next(call)
        assert first.prompt_progress.evaluated_count < CONTEXT // 2
        began = time.monotonic()
        child.process.send_signal(number)
        with pytest.raises(grpc.RpcError, match="stopping"):
            list(call)
        _assert_stopped_in_time(child, path, began)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_ends_sixteen_streams_and_queued_requests(
    tmp_path: Path, socket_dir: Path, model: str, number: signal.Signals
) -> None:
    path = socket_dir / "s"
    with running(tmp_path, "--listen", f"unix:{path}") as child:
        _load(child, model, parallel=16)
        calls = [child.complete(CONTEXT - 10) for _ in range(20)]
        child.wait_for(lambda: child.status().running_count == 16)
        began = time.monotonic()
        child.process.send_signal(number)
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                list(call)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        _assert_stopped_in_time(child, path, began)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_stop_does_not_wait_for_a_reader_that_stopped_reading(
    tmp_path: Path, socket_dir: Path, model: str, number: signal.Signals
) -> None:
    path = socket_dir / "s"
    with running(tmp_path, "--listen", f"unix:{path}") as child:
        _load(child, model)
        # Log probabilities fill the connection's window, then the request's output channel.
        options = pb.CompletionOptions(num_predict=CONTEXT - 10, logit_bias={0: -100})
        request = pb.CompletionRequest(prompt="def", options=options, logprobs=20)
        with grpc.insecure_channel(child.ready.target, options=SMALL_WINDOW) as channel:
            stub = runner_pb2_grpc.RunnerServiceStub(channel)
            call = stub.Completion(request, timeout=DEADLINE_SECONDS)
            next(call)
            # The request is preempted: the engine has nothing to do.
            child.wait_for(lambda: not child.status().HasField("last_progress_age"))
            assert child.status().running_count == 1
            began = time.monotonic()
            child.process.send_signal(number)
            _assert_stopped_in_time(child, path, began)


@pytest.mark.parametrize("numbers", [SIGNALS, SIGNALS[::-1], [signal.SIGTERM] * 2])
def test_a_second_stop_ends_the_server_at_once(
    tmp_path: Path, socket_dir: Path, model: str, numbers: list[signal.Signals]
) -> None:
    """The second signal means "now": exit code 128 plus the signal's number, as in a shell."""
    path = socket_dir / "s"
    with running(tmp_path, "--listen", f"unix:{path}") as child:
        _load(child, model)
        calls = [child.complete(CONTEXT - 10) for _ in range(4)]
        child.wait_for(lambda: child.status().running_count == 4)
        began = time.monotonic()
        for number in numbers:
            os.kill(child.process.pid, number)
        # The shutdown may be complete before the second signal arrives.
        assert child.wait() in (0, *(128 + number for number in numbers))
        assert time.monotonic() - began < 1
        assert calls
        _assert_gone(child, path)
