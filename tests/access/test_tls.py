"""TLS and mutual TLS over the wire, by three implementations; files that change or are bad."""

from __future__ import annotations

import asyncio
import shutil
import ssl
import subprocess
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import support.plain_http2 as plain_http2
from mlxrunner.v1 import runner_pb2 as pb
from runner_client import (
    AsyncRunnerClient,
    AuthenticationError,
    RunnerClient,
    RunnerUnavailableError,
    TlsFiles,
)
from runner_server.config import parse_args
from runner_server.transport import tls
from runner_server.transport.listen import CannotListenError
from runner_server.transport.tls import BadTlsFilesError, server_credentials
from support.certificates import Authority, Pair
from support.fakes import FakeBackend
from support.harness import running

STATUS = "mlxrunner.v1.RunnerService/Status"
TOKEN = "correct-horse-battery-staple"  # noqa: S105 - of a test


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return authority.sign("server")


@asynccontextmanager
async def serving(
    folder: Path, pair: Pair, client_ca: Path | None = None, **config: Any
) -> AsyncIterator[str]:
    """Runs a server with TLS; yields its address by a name that certificates have."""
    files = tls.TlsFiles(pair.cert, pair.key, client_ca)
    parts = running(folder, FakeBackend(), listen="localhost:0", tls=files, **config)
    async with parts as (_, _, ready):
        yield ready.target


def files_of(authority: Authority, own: Pair | None = None) -> TlsFiles:
    return TlsFiles(authority.file, own.cert, own.key) if own else TlsFiles(authority.file)


async def ask(address: str, files: TlsFiles | None, token: str | None = None) -> int:
    """The process id, asked by the asyncio client over a connection of its own."""
    async with AsyncRunnerClient(address, tls=files, token=token) as client:
        return (await client.status()).pid


def ask_blocking(address: str, files: TlsFiles | None, token: str | None = None) -> int:
    with RunnerClient(address, tls=files, token=token) as client:
        return client.status().pid


async def both(address: str, files: TlsFiles | None, token: str | None = None) -> None:
    assert await ask(address, files, token)
    assert await asyncio.to_thread(ask_blocking, address, files, token)


async def refused(address: str, files: TlsFiles | None) -> None:
    """Checks that both clients get nowhere, not even to health, which is never retried."""

    def blocking() -> None:
        with RunnerClient(address, tls=files) as client:
            client.is_serving()

    async with AsyncRunnerClient(address, tls=files) as client:
        with pytest.raises(RunnerUnavailableError):
            await client.is_serving()
    with pytest.raises(RunnerUnavailableError):
        await asyncio.to_thread(blocking)


def context_of(files: TlsFiles) -> ssl.SSLContext:
    """The same for Python's own TLS, which is OpenSSL; grpcio's is BoringSSL."""
    context = ssl.create_default_context(cafile=files.ca)
    if files.cert and files.key:
        context.load_cert_chain(files.cert, files.key)
    return context


async def by_hand(address: str, files: TlsFiles) -> plain_http2.Answer:
    port = int(address.rpartition(":")[2])
    return await asyncio.to_thread(plain_http2.call, port, STATUS, tls=context_of(files))


async def by_grpcurl(address: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["grpcurl", "-max-time", "5", *map(str, arguments), address, STATUS]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=30, check=False
    )


async def test_tls(socket_dir: Path, authority: Authority, pair: Pair) -> None:
    async with serving(socket_dir, pair) as address:
        await both(address, files_of(authority))
        answer = await by_hand(address, files_of(authority))
        assert pb.StatusResponse.FromString(answer.message).pid
        # In clear, and by somebody who trusts another authority.
        await refused(address, None)
        await refused(address, files_of(Authority(socket_dir, "other")))


async def test_tls_on_a_unix_socket(socket_dir: Path, authority: Authority, pair: Pair) -> None:
    files = tls.TlsFiles(pair.cert, pair.key)
    async with running(socket_dir, FakeBackend(), tls=files) as (_, _, ready):
        await both(ready.target, files_of(authority))


async def test_a_token_inside_tls(socket_dir: Path, authority: Authority, pair: Pair) -> None:
    async with serving(socket_dir, pair, token=TOKEN) as address:
        await both(address, files_of(authority), TOKEN)
        with pytest.raises(AuthenticationError):
            await ask(address, files_of(authority))


async def test_an_expired_server_is_refused_by_its_clients(
    socket_dir: Path, authority: Authority
) -> None:
    async with serving(socket_dir, authority.sign("expired", days=-1)) as address:
        await refused(address, files_of(authority))
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            await by_hand(address, files_of(authority))


async def test_mutual_tls(socket_dir: Path, authority: Authority, pair: Pair) -> None:
    own = authority.sign("client")
    foreign = Authority(socket_dir, "other").sign("foreign")
    async with serving(socket_dir, pair, authority.file) as address:
        await both(address, files_of(authority, own))
        answer = await by_hand(address, files_of(authority, own))
        assert pb.StatusResponse.FromString(answer.message).pid
        for bad in (None, authority.sign("expired", days=-1), foreign):
            await refused(address, files_of(authority, bad))
            # TLS 1.3 tells a client of its refusal when it first reads.
            with pytest.raises(OSError):  # noqa: PT011 - reset, or one of many TLS alerts
                await by_hand(address, files_of(authority, bad))


@pytest.mark.skipif(not shutil.which("grpcurl"), reason="grpcurl is not installed")
async def test_by_grpcurl(socket_dir: Path, authority: Authority, pair: Pair) -> None:
    own, expired = authority.sign("client"), authority.sign("expired", days=-1)
    trust = ("-cacert", authority.file)
    async with serving(socket_dir, pair, authority.file) as address:
        done = await by_grpcurl(address, *trust, "-cert", own.cert, "-key", own.key)
        assert done.returncode == 0, done.stderr
        for bad in ((), ("-cert", expired.cert, "-key", expired.key)):
            assert (await by_grpcurl(address, *trust, *bad)).returncode != 0
        assert (await by_grpcurl(address, "-plaintext")).returncode != 0


async def test_files_that_change_are_used_by_the_next_connection(
    socket_dir: Path, authority: Authority, pair: Pair
) -> None:
    other = Authority(socket_dir, "other")
    async with (
        serving(socket_dir, pair) as address,
        AsyncRunnerClient(address, tls=files_of(authority)) as open_client,
    ):
        pid = (await open_client.status()).pid
        put(other.sign("next"), pair)
        await both(address, files_of(other))
        await refused(address, files_of(authority))
        # Who was connected stays connected.
        assert (await open_client.status()).pid == pid


async def test_an_expired_certificate_is_replaced_without_a_restart(
    socket_dir: Path, authority: Authority
) -> None:
    pair = authority.sign("server", days=-1)
    async with serving(socket_dir, pair) as address:
        await refused(address, files_of(authority))
        put(authority.sign("next"), pair)
        await both(address, files_of(authority))


async def test_the_clients_authority_may_change_too(
    socket_dir: Path, authority: Authority, pair: Pair
) -> None:
    trusted = socket_dir / "trusted.pem"
    shutil.copy(authority.file, trusted)
    other = Authority(socket_dir, "other")
    old, new = authority.sign("old"), other.sign("new")
    async with serving(socket_dir, pair, trusted) as address:
        await both(address, files_of(authority, old))
        await refused(address, files_of(authority, new))
        shutil.copy(other.file, trusted)
        await both(address, files_of(authority, new))
        await refused(address, files_of(authority, old))


async def test_half_of_a_change_leaves_the_last_good_files(
    socket_dir: Path, authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "runner_server.transport.tls")
    new = authority.sign("next")
    spoilt: list[Callable[[], object]] = [
        partial(shutil.copy, new.cert, pair.cert),
        partial(pair.cert.write_text, ""),
        pair.cert.unlink,
        partial(pair.key.write_text, "no key"),
    ]
    async with serving(socket_dir, pair) as address:
        for spoil in spoilt:
            caplog.clear()
            spoil()
            await both(address, files_of(authority))
            errors = [
                entry for entry in caplog.records if entry.name == "runner_server.transport.tls"
            ]
            # Told once for a change, not for each connection.
            assert [entry.levelname for entry in errors] == ["ERROR"]
        put(new, pair)
        await both(address, files_of(authority))
        assert "have changed" in caplog.text


def put(new: Pair, place: Pair) -> None:
    """Puts a certificate and its key in another's place, as one would by hand."""
    shutil.copy(new.cert, place.cert)
    shutil.copy(new.key, place.key)


def test_files_that_change_while_they_are_read_are_read_again(
    authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tls._Source(tls.TlsFiles(pair.cert, pair.key))
    source.read()
    check = tls._check
    put(authority.sign("next"), pair)

    def change_then_check(files: tls.TlsFiles) -> None:
        put(authority.sign("later"), pair)
        check(files)

    with monkeypatch.context() as patch:
        patch.setattr(tls, "_check", change_then_check)
        assert source.fetch() is None
    assert source.fetch() is not None
    assert source.fetch() is None


def put_folder(place: Path) -> None:
    place.unlink()
    place.mkdir()


BAD: dict[str, tuple[str, Callable[[Pair], object]]] = {
    "none": ("cannot be read: No such file", lambda pair: pair.cert.unlink()),
    "no key": ("cannot be read: No such file", lambda pair: pair.key.unlink()),
    "empty": ("not a certificate and its private key", lambda pair: pair.cert.write_text("")),
    "not text": ("not a certificate", lambda pair: pair.cert.write_bytes(bytes(range(256)))),
    "folder": ("Is a directory", lambda pair: put_folder(pair.key)),
    "swapped": ("not a certificate", lambda pair: shutil.copy(pair.cert, pair.key)),
}


@pytest.mark.parametrize("how", BAD)
def test_bad_files_end_the_start(pair: Pair, how: str) -> None:
    message, spoil = BAD[how]
    spoil(pair)
    with pytest.raises(BadTlsFilesError, match=message) as caught:
        server_credentials(tls.TlsFiles(pair.cert, pair.key))
    assert str(pair.cert.parent) in str(caught.value)


def test_a_key_with_a_password_does_not_ask_the_terminal(authority: Authority) -> None:
    pair = authority.sign("locked", password=b"secret")
    errors: list[Exception] = []

    def read() -> None:
        try:
            server_credentials(tls.TlsFiles(pair.cert, pair.key))
        except BadTlsFilesError as error:
            errors.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert "without a password" in str(errors[0])


def test_an_authority_of_clients_that_is_none(pair: Pair, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    with pytest.raises(BadTlsFilesError, match="has no certificate"):
        server_credentials(tls.TlsFiles(pair.cert, pair.key, empty))


async def test_the_server_says_which_file_it_cannot_use(socket_dir: Path, pair: Pair) -> None:
    pair.key.unlink()
    with pytest.raises(CannotListenError, match=r"server\.key cannot be read"):
        async with serving(socket_dir, pair):
            pass


@pytest.mark.parametrize(
    "argv",
    [["--tls-cert", "a"], ["--tls-key", "a"], ["--tls-client-ca", "a"]],
)
def test_options_that_need_each_other(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert "--tls-cert" in capsys.readouterr().err


def test_the_options() -> None:
    argv = ["--tls-cert", "a", "--tls-key", "b", "--tls-client-ca", "c"]
    assert parse_args(argv).tls == tls.TlsFiles(Path("a"), Path("b"), Path("c"))
    assert parse_args([]).tls is None


def test_a_clients_certificate_needs_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both of cert and key"):
        TlsFiles(cert="a")
    with pytest.raises(FileNotFoundError, match="none"):
        RunnerClient("localhost:1", tls=TlsFiles(tmp_path / "none"))
