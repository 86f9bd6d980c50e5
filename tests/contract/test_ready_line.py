"""Listening addresses, and the ready line with the chosen one."""

from __future__ import annotations

import stat
from pathlib import Path

import grpc
import pytest

from runner_common.handshake import ReadyLine
from runner_common.serving.listen import CannotListenError
from runner_server.app import RunnerApp
from runner_server.config import ServerConfig, parse_args
from runner_server.engine.types import LoadSpec
from support.fakes import FakeBackend
from support.harness import Server, StartServer, running


async def test_the_ready_line_has_the_chosen_port(start_server: StartServer) -> None:
    server = await start_server(listen="127.0.0.1:0")
    fields = server.ready.format().split("|")
    assert fields[:3] == ["1", "1", "tcp"]
    assert fields[4:] == ["grpc"]
    host, _, port = fields[3].partition(":")
    assert host == "127.0.0.1"
    assert 0 < int(port) < 65536
    assert (await server.status()).pid


async def test_the_ready_line_has_the_socket_path(
    start_server: StartServer, socket_dir: Path
) -> None:
    path = socket_dir / "r.sock"
    server = await start_server(listen=f"unix:{path}")
    assert server.ready.format() == f"1|1|unix|{path}|grpc"
    assert (await server.status()).pid
    mode = path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) & 0o077 == 0


@pytest.mark.parametrize(
    ("ready", "line", "target", "port"),
    [
        (ReadyLine("tcp", "127.0.0.1:5"), "1|1|tcp|127.0.0.1:5|grpc", "127.0.0.1:5", 5),
        (ReadyLine("tcp", "[::1]:80"), "1|1|tcp|[::1]:80|grpc", "[::1]:80", 80),
        (ReadyLine("unix", "/a b/c"), "1|1|unix|/a b/c|grpc", "unix:/a b/c", None),
    ],
)
def test_a_ready_line_is_formatted_and_parsed(
    ready: ReadyLine, line: str, target: str, port: int | None
) -> None:
    assert ready.format() == line
    assert ReadyLine.parse(line + "\n") == ready
    assert (ready.target, ready.port) == (target, port)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "hello",
        "1|1|tcp|127.0.0.1:5",
        "2|1|tcp|127.0.0.1:5|grpc",
        "1|2|tcp|127.0.0.1:5|grpc",
        "1|1|tcp|127.0.0.1:5|netrpc",
        "1|1|tcp|127.0.0.1:x|grpc",
        "1|1|udp|127.0.0.1:5|grpc",
        "1|1|unix||grpc",
        "1|1|tcp|127.0.0.1:5|grpc|cert",
    ],
)
def test_another_line_is_not_parsed(line: str) -> None:
    with pytest.raises(ValueError, match="not a ready line"):
        ReadyLine.parse(line)


async def _refusal(listen: str) -> str:
    app = RunnerApp(ServerConfig(listen=listen), FakeBackend())
    with pytest.raises(CannotListenError) as caught:
        await app.start()
    await app.close()
    return str(caught.value)


async def test_a_second_server_on_a_port_fails(start_server: StartServer) -> None:
    first = await start_server(listen="127.0.0.1:0")
    assert first.ready.address in await _refusal(first.ready.address)
    assert (await first.status()).pid


async def test_a_second_server_on_a_socket_fails_and_the_first_goes_on(server: Server) -> None:
    assert "exists already" in await _refusal(server.ready.target)
    assert (await server.status()).pid
    async with grpc.aio.insecure_channel(server.ready.target) as channel:
        fresh = Server(server.app, server.backend, channel, server.ready)
        assert (await fresh.status()).runner_id == (await server.status()).runner_id


async def test_a_file_at_the_socket_path_is_left_alone(socket_dir: Path) -> None:
    file = socket_dir / "file"
    file.write_text("mine")
    assert "is a file" in await _refusal(f"unix:{file}")
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "listen",
    [
        "",
        "8080",
        ":8080",
        "127.0.0.1:",
        "127.0.0.1:http",
        "127.0.0.1:-1",
        "127.0.0.1:99999",
        "203.0.113.1:0",
        "unix:",
        "unix:/nowhere/at/all/s",
        "unix:/" + "x" * 120,
    ],
)
async def test_an_unusable_address_is_refused(listen: str) -> None:
    message = await _refusal(listen)
    assert listen.removeprefix("unix:") in message


async def test_a_socket_path_may_have_107_bytes(socket_dir: Path) -> None:
    room = 107 - len(str(socket_dir)) - 1
    path = socket_dir / ("s" * room)
    async with running(socket_dir, FakeBackend(), listen=f"unix:{path}") as (_, _, ready):
        assert ready.address == str(path)
    assert "108 bytes" in await _refusal(f"unix:{path}s")


async def test_the_socket_is_removed_at_the_end(socket_dir: Path) -> None:
    path = socket_dir / "gone"
    async with running(socket_dir, FakeBackend(), listen=f"unix:{path}"):
        assert path.exists()
    assert not path.exists()


def test_the_command_line_becomes_the_config() -> None:
    assert parse_args([]) == ServerConfig()
    sizes = ["--memory-limit", "8GiB", "--prefix-cache-bytes", "512MiB"]
    assert parse_args(["--model", "m", *sizes]).load == LoadSpec(
        "m", memory_limit_bytes=8 * 2**30, prefix_cache_bytes=512 * 2**20
    )
    config = parse_args(["--model", "m", "--parallel", "2", "--listen", "unix:/s"])
    assert config.load
    assert (config.load.model, config.load.parallel, config.listen) == ("m", 2, "unix:/s")


@pytest.mark.parametrize(
    "argv",
    [
        ["--parallel", "0"],
        ["--parallel", "x"],
        ["--parallel", "257", "--model", "m"],
        ["--context-length", "1", "--model", "m"],
        ["--max-queued", "-1"],
        ["--dtype", "int3"],
        ["--dtype", "float32"],
        ["--prefix-cache", "0"],
        ["--pipeline"],
        ["stray"],
    ],
)
def test_a_wrong_command_line_is_refused(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_args(argv)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("\nsee mlx-runner serve --help\n")
