"""go-plugin's ``Kill`` ends the host's own server, and no other."""

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


def test_go_plugin_can_end_the_server_it_started(tmp_path: Path) -> None:
    with running(tmp_path, PLUGIN_PROTOCOL_VERSIONS="1") as child:
        _shut_down(child)
        assert child.wait() == 0


def test_no_other_server_can_be_ended_by_a_call(tmp_path: Path) -> None:
    with running(tmp_path) as child:
        with pytest.raises(grpc.RpcError) as caught:
            _shut_down(child)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert child.status().pid == child.process.pid
