"""Fault 5: a stop in every phase, under load, and asked for more than once.

While it starts, idles, loads and decodes: tests/e2e/test_server_process.py, with both signals.
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
"""The most the server drains; the client's grace is longer."""

SIGNALS = [signal.SIGINT, signal.SIGTERM]
CONTEXT = 32_000
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 << 10)]


def _load(child: Child, model: str, parallel: int = 4) -> None:
    request = pb.LoadRequest(model=model, parallel=parallel, context_length=CONTEXT)
    child.stub.Load(request, timeout=DEADLINE_SECONDS)


def _ended(child: Child, path: Path, began: float) -> None:
    assert child.wait() == 0, child.log.read_text()
    assert time.monotonic() - began < GRACE_SECONDS
    _gone(child, path)


def _gone(child: Child, path: Path) -> None:
    """Its memory is the system's again when its id is nobody's; so is its address."""
    assert not psutil.pid_exists(child.process.pid)
    assert not path.exists()
    assert "Traceback" not in child.log.read_text()


@pytest.mark.parametrize("number", SIGNALS)
def test_while_a_prompt_is_evaluated(
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
        _ended(child, path, began)


@pytest.mark.parametrize("number", SIGNALS)
def test_with_sixteen_streams_and_more_that_wait(
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
        _ended(child, path, began)


@pytest.mark.parametrize("number", SIGNALS)
def test_with_a_reader_that_has_stopped_reading(
    tmp_path: Path, socket_dir: Path, model: str, number: signal.Signals
) -> None:
    path = socket_dir / "s"
    with running(tmp_path, "--listen", f"unix:{path}") as child:
        _load(child, model)
        # Log probabilities fill what the connection takes, and then what waits before it.
        options = pb.CompletionOptions(num_predict=CONTEXT - 10, logit_bias={0: -100})
        request = pb.CompletionRequest(prompt="def", options=options, logprobs=20)
        with grpc.insecure_channel(child.ready.target, options=SMALL_WINDOW) as channel:
            stub = runner_pb2_grpc.RunnerServiceStub(channel)
            call = stub.Completion(request, timeout=DEADLINE_SECONDS)
            next(call)
            # Its row is set aside: the engine has nothing to do.
            child.wait_for(lambda: not child.status().HasField("last_progress_age"))
            assert child.status().running_count == 1
            began = time.monotonic()
            child.process.send_signal(number)
            _ended(child, path, began)


@pytest.mark.parametrize("numbers", [SIGNALS, SIGNALS[::-1], [signal.SIGTERM] * 2])
def test_asked_twice_it_goes_at_once(
    tmp_path: Path, socket_dir: Path, model: str, numbers: list[signal.Signals]
) -> None:
    """The second signal means "now": 128 and its number, as a shell tells it."""
    path = socket_dir / "s"
    with running(tmp_path, "--listen", f"unix:{path}") as child:
        _load(child, model)
        calls = [child.complete(CONTEXT - 10) for _ in range(4)]
        child.wait_for(lambda: child.status().running_count == 4)
        began = time.monotonic()
        for number in numbers:
            os.kill(child.process.pid, number)
        # The first may be all that it had to see.
        assert child.wait() in (0, *(128 + number for number in numbers))
        assert time.monotonic() - began < 1
        assert calls
        _gone(child, path)
