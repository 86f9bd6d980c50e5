"""What go-plugin's ``Kill`` asks of a server process: to end, and only its own child."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from support.server_child import DEADLINE_SECONDS, Child, running

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = pytest.mark.mlx


def _shut_down(child: Child) -> None:
    shutdown: grpc.UnaryUnaryMultiCallable[bytes, bytes] = child.channel.unary_unary(
        "/plugin.GRPCController/Shutdown"
    )
    assert shutdown(b"", timeout=DEADLINE_SECONDS) == b""


def test_go_plugin_ends_the_server_that_it_started(tmp_path: Path) -> None:
    with running(tmp_path, PLUGIN_PROTOCOL_VERSIONS="1") as child:
        _shut_down(child)
        assert child.wait() == 0


def test_nobody_ends_another_server_by_a_call(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        with pytest.raises(grpc.RpcError) as caught:
            _shut_down(child)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert child.status().pid == child.process.pid
