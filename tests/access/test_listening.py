"""Addresses a server may listen on without a token or client certificates."""

from __future__ import annotations

import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from runner_common.serving.auth import is_loopback
from runner_common.serving.listen import CannotListenError
from runner_common.serving.tls import TlsFiles
from support.certificates import Authority
from support.fakes import FakeBackend
from support.harness import StartServer, running

TOKEN = "correct-horse-battery-staple"  # noqa: S105 - of a test
OPEN = ["0.0.0.0:0", "[::]:0", "0:0", "[::ffff:0.0.0.0]:0", "192.0.2.1:0"]
LOOPBACK = ["127.0.0.1", "127.8.9.1", "[::1]", "::1", "localhost", "127.1", "[::ffff:127.0.0.1]"]


@asynccontextmanager
async def listening(folder: Path, listen: str, **config: Any) -> AsyncIterator[str]:
    async with running(folder, FakeBackend(), listen=listen, **config) as (_, _, ready):
        yield ready.target


@pytest.mark.parametrize("listen", OPEN)
async def test_an_address_open_to_other_machines_is_refused(socket_dir: Path, listen: str) -> None:
    with pytest.raises(CannotListenError, match="open to other machines") as caught:
        async with listening(socket_dir, listen):
            pass
    # The message lists every remedy.
    for way in ("--token-file", "MLX_RUNNER_TOKEN", "--tls-cert", "--tls-client-ca", "127.0.0.1"):
        assert way in str(caught.value)
    assert listen in str(caught.value)


def resolver_of(*addresses: str) -> Callable[..., list[Any]]:
    """Return a ``getaddrinfo`` resolving every name to these addresses."""
    return lambda *_args, **_kwargs: [(0, 0, 0, "", (address, 0)) for address in addresses]


@pytest.mark.parametrize(
    ("addresses", "is_local"),
    [
        (["127.0.0.1"], True),
        (["127.0.0.1", "::1"], True),
        (["192.0.2.7"], False),
        (["127.0.0.1", "192.0.2.7"], False),
        (["::1", "fe80::1%1"], False),
    ],
)
async def test_a_name_counts_as_the_addresses_it_resolves_to(
    socket_dir: Path, monkeypatch: pytest.MonkeyPatch, addresses: list[str], *, is_local: bool
) -> None:
    monkeypatch.setattr("runner_common.serving.auth.socket.getaddrinfo", resolver_of(*addresses))
    assert is_loopback("some.host") is is_local
    if not is_local:
        with pytest.raises(CannotListenError, match="open to other machines"):
            async with listening(socket_dir, "some.host:0"):
                pass


@pytest.mark.parametrize("host", LOOPBACK)
def test_loopback_addresses_are_recognized(host: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    assert is_loopback(host)


@pytest.mark.parametrize(
    "listen",
    [
        "no.such.host.invalid:0",
        "a..b:0",
        # gRPC would accept these as addresses of its own schemes and listen on them.
        "ipv4:0.0.0.0:0",
        "ipv6:[::]:0",
        "unix-abstract:name:0",
        "dns:///0.0.0.0:0",
        "dns:0",
        "::1:0",
        ":::0",
    ],
)
async def test_an_invalid_host_is_refused(socket_dir: Path, listen: str) -> None:
    with pytest.raises(CannotListenError, match=r"cannot listen on|expected HOST:PORT"):
        async with listening(socket_dir, listen, token=TOKEN):
            pass


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> str:
    """A loopback address, taken by the server for one reachable from other machines."""
    monkeypatch.setattr("runner_common.serving.listen.is_loopback", lambda _host: False)
    return "127.0.0.1:0"


async def test_a_token_permits_other_machines_with_a_warning(
    socket_dir: Path, reachable: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with listening(socket_dir, reachable, token=TOKEN):
        pass
    assert "sent in the clear" in caplog.text
    assert TOKEN not in caplog.text


async def test_tls_alone_permits_other_machines_with_a_warning(
    socket_dir: Path, reachable: str, caplog: pytest.LogCaptureFixture
) -> None:
    pair = Authority(socket_dir).sign("server")
    async with listening(socket_dir, reachable, tls=TlsFiles(pair.cert, pair.key)):
        pass
    assert "without authentication" in caplog.text


@pytest.mark.parametrize("config", ["token", "client_ca"])
async def test_tls_with_a_token_or_client_ca_gives_no_warning(
    socket_dir: Path, reachable: str, caplog: pytest.LogCaptureFixture, config: str
) -> None:
    authority = Authority(socket_dir)
    pair = authority.sign("server")
    files = TlsFiles(pair.cert, pair.key, authority.file if config == "client_ca" else None)
    token = TOKEN if config == "token" else None
    async with listening(socket_dir, reachable, tls=files, token=token):
        pass
    assert "open to other machines" not in caplog.text


async def test_other_machines_and_users_cannot_connect_by_default(
    start_server: StartServer, socket_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server = await start_server(listen="127.0.0.1:0")
    assert server.ready.address.startswith("127.0.0.1:")
    assert not caplog.records
    path = socket_dir / "s"
    await start_server(listen=f"unix:{path}")
    assert stat.S_IMODE(path.stat().st_mode) & 0o177 == 0
