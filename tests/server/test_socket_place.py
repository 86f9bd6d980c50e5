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

from runner_server.transport.unix_socket import OccupiedError, socket_place
from support.faulty import TESTS, fake_engine

ROOT = TESTS.parent
OTHER_USER = 60001


@pytest.fixture
def place(socket_dir: Path) -> Path:
    return socket_dir / "s"


@pytest.fixture
def live(place: Path) -> Iterator[socket.socket]:
    """A listening socket without an accept loop."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen(0)
        yield listener


def leave_dead(place: Path, kind: socket.SocketKind = socket.SOCK_STREAM) -> None:
    """Leave the file of a closed socket."""
    with socket.socket(socket.AF_UNIX, kind) as dead:
        dead.bind(str(place))


def test_a_free_place_is_taken(place: Path) -> None:
    with socket_place(place):
        assert not place.exists()


def test_a_dead_socket_is_removed(place: Path) -> None:
    leave_dead(place)
    with socket_place(place):
        assert not place.exists()


def test_a_live_socket_stays(place: Path, live: socket.socket) -> None:
    with pytest.raises(OccupiedError, match="socket in use"), socket_place(place):
        pass
    live.accept()[0].close()
    assert place.exists()


@pytest.mark.usefixtures("live")
def test_a_live_socket_with_a_full_queue_stays(place: Path) -> None:
    callers = []
    try:
        while True:
            caller = socket.socket(socket.AF_UNIX)
            callers.append(caller)
            caller.settimeout(0)
            caller.connect(str(place))
    except BlockingIOError:
        pass
    with pytest.raises(OccupiedError, match="socket in use"), socket_place(place):
        pass
    for caller in callers:
        caller.close()


def test_what_is_no_socket_of_a_server_stays(place: Path) -> None:
    place.write_text("mine")
    with pytest.raises(OccupiedError, match="is a file"), socket_place(place):
        pass
    assert place.read_text() == "mine"
    place.unlink()
    place.mkdir()
    with pytest.raises(OccupiedError, match="is a directory"), socket_place(place):
        pass
    place.rmdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(place))
        with pytest.raises(OccupiedError, match="socket in use"), socket_place(place):
            pass


ASK_AS_OTHER = """
import os, sys
from pathlib import Path
from runner_server.transport.unix_socket import OccupiedError, socket_place
os.setuid(int(sys.argv[2]))
try:
    with socket_place(Path(sys.argv[1])):
        pass
except OccupiedError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.usefixtures("live")
def test_another_users_live_socket_stays(place: Path) -> None:
    place.parent.chmod(0o777)
    place.chmod(0o600)
    done = subprocess.run(
        [sys.executable, "-c", ASK_AS_OTHER, str(place), str(OTHER_USER)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "another user's socket" in done.stdout
    assert place.exists()


def test_one_of_two_waits_while_the_other_binds(place: Path) -> None:
    leave_dead(place)
    second: list[str] = []

    def take() -> None:
        try:
            with socket_place(place):
                second.append("taken")
        except OccupiedError as error:
            second.append(str(error))

    with socket.socket(socket.AF_UNIX) as listener:
        with socket_place(place):
            thread = threading.Thread(target=take)
            thread.start()
            listener.bind(str(place))
            listener.listen()
        thread.join()
    assert len(second) == 1
    assert "socket in use" in second[0]


def start(place: Path) -> subprocess.Popen[str]:
    """Start a server with a fake model library."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "proto")))
    return subprocess.Popen(
        [*fake_engine(), "--listen", f"unix:{place}"],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def first_line(server: subprocess.Popen[str]) -> str:
    assert server.stdout
    return server.stdout.readline().strip()


def test_after_a_kill_one_of_many_servers_starts(place: Path) -> None:
    """Start four at once, as a supervisor and its operator may."""
    killed = start(place)
    assert first_line(killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert place.exists()
    servers = [start(place) for _ in range(4)]
    lines = [first_line(server) for server in servers]
    for server in servers:
        server.send_signal(signal.SIGTERM)
    logs = [server.communicate()[1] for server in servers]
    assert [line for line in lines if line] == [f"1|1|unix|{place}|grpc"]
    assert sum("socket in use" in log for log in logs) == 3
    assert sorted(server.returncode for server in servers) == [0, 1, 1, 1]
    assert not place.exists()
