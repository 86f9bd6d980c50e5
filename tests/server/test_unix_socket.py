"""The file of a unix socket: a dead server's is replaced, a live one's is not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner_common.serving.unix_socket import OccupiedError, socket_place
from support.faulty import TESTS, fake_engine

ROOT = TESTS.parent
OTHER_USER = 60001


@pytest.fixture
def path(socket_dir: Path) -> Path:
    return socket_dir / "s"


@pytest.fixture
def live_socket(path: Path) -> Iterator[socket.socket]:
    """A listening socket without an accept loop."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(0)
        yield listener


def leave_dead(path: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
    """Leave the file of a closed socket."""
    with socket.socket(socket.AF_UNIX, kind) as dead:
        dead.bind(str(path))


def test_a_free_path_is_accepted(path: Path) -> None:
    with socket_place(path):
        assert not path.exists()


def test_a_dead_socket_is_removed(path: Path) -> None:
    leave_dead(path)
    with socket_place(path):
        assert not path.exists()


def test_a_live_socket_stays(path: Path, live_socket: socket.socket) -> None:
    with pytest.raises(OccupiedError, match="socket in use"), socket_place(path):
        pass
    live_socket.accept()[0].close()
    assert path.exists()


@pytest.mark.usefixtures("live_socket")
def test_a_live_socket_with_a_full_queue_stays(path: Path) -> None:
    callers = []
    try:
        while True:
            caller = socket.socket(socket.AF_UNIX)
            callers.append(caller)
            caller.settimeout(0)
            caller.connect(str(path))
    except BlockingIOError:
        pass
    with pytest.raises(OccupiedError, match="socket in use"), socket_place(path):
        pass
    for caller in callers:
        caller.close()


def test_another_kind_of_file_stays(path: Path) -> None:
    path.write_text("mine")
    with pytest.raises(OccupiedError, match="is a file"), socket_place(path):
        pass
    assert path.read_text() == "mine"
    path.unlink()
    path.mkdir()
    with pytest.raises(OccupiedError, match="is a directory"), socket_place(path):
        pass
    path.rmdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(OccupiedError, match="socket in use"), socket_place(path):
            pass


ASK_AS_OTHER = """
import os, sys
from pathlib import Path
from runner_common.serving.unix_socket import OccupiedError, socket_place
os.setuid(int(sys.argv[2]))
try:
    with socket_place(Path(sys.argv[1])):
        pass
except OccupiedError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.usefixtures("live_socket")
def test_another_users_live_socket_stays(path: Path) -> None:
    path.parent.chmod(0o777)
    path.chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-c", ASK_AS_OTHER, str(path), str(OTHER_USER)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "another user's socket" in done.stdout
    assert path.exists()


def test_a_second_server_waits_while_the_first_binds(path: Path) -> None:
    leave_dead(path)
    second: list[str] = []

    def take() -> None:
        try:
            with socket_place(path):
                second.append("taken")
        except OccupiedError as error:
            second.append(str(error))

    with socket.socket(socket.AF_UNIX) as listener:
        with socket_place(path):
            thread = threading.Thread(target=take)
            thread.start()
            listener.bind(str(path))
            listener.listen()
        thread.join()
    assert len(second) == 1
    assert "socket in use" in second[0]


def start_server(path: Path) -> subprocess.Popen[str]:
    """Start a server with a fake model library."""
    python_path = os.pathsep.join((str(ROOT), str(ROOT / "proto")))
    return subprocess.Popen(
        [*fake_engine(), "--listen", f"unix:{path}"],
        env={**os.environ, "PYTHONPATH": python_path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_line(server: subprocess.Popen[str]) -> str:
    assert server.stdout
    return server.stdout.readline().strip()


@pytest.mark.slow
def test_after_a_kill_one_of_many_servers_starts(path: Path) -> None:
    """Start four at once, as a supervisor and its operator may."""
    killed = start_server(path)
    assert first_line(killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert path.exists()
    servers = [start_server(path) for _ in range(4)]
    lines = [first_line(server) for server in servers]
    for server in servers:
        server.send_signal(signal.SIGTERM)
    logs = [server.communicate()[1] for server in servers]
    assert [line for line in lines if line] == [f"1|1|unix|{path}|grpc"]
    assert sum("socket in use" in log for log in logs) == 3
    assert sorted(server.returncode for server in servers) == [0, 1, 1, 1]
    assert not path.exists()
