"""TLS and mutual TLS by three implementations; changed and unusable files."""

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
from runner_common.serving import tls
from runner_common.serving.listen import CannotListenError
from runner_common.serving.tls import BadTlsFilesError, server_credentials
from runner_server.config import parse_args
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
    """Run a server with TLS and yield the address by the name in the certificates."""
    files = tls.TlsFiles(pair.cert, pair.key, client_ca)
    parts = running(folder, FakeBackend(), listen="localhost:0", tls=files, **config)
    async with parts as (_, _, ready):
        yield ready.target


def files_of(authority: Authority, own: Pair | None = None) -> TlsFiles:
    return TlsFiles(authority.file, own.cert, own.key) if own else TlsFiles(authority.file)


async def fetch_pid(address: str, files: TlsFiles | None, token: str | None = None) -> int:
    """Return the server's process id, asked over a new connection by the asyncio client."""
    async with AsyncRunnerClient(address, tls=files, token=token) as client:
        return (await client.status()).pid


def fetch_pid_blocking(address: str, files: TlsFiles | None, token: str | None = None) -> int:
    with RunnerClient(address, tls=files, token=token) as client:
        return client.status().pid


async def assert_served(address: str, files: TlsFiles | None, token: str | None = None) -> None:
    assert await fetch_pid(address, files, token)
    assert await asyncio.to_thread(fetch_pid_blocking, address, files, token)


async def assert_refused(address: str, files: TlsFiles | None) -> None:
    """Check both clients fail, even with health, which is never retried."""

    def blocking() -> None:
        with RunnerClient(address, tls=files) as client:
            client.is_serving()

    async with AsyncRunnerClient(address, tls=files) as client:
        with pytest.raises(RunnerUnavailableError):
            await client.is_serving()
    with pytest.raises(RunnerUnavailableError):
        await asyncio.to_thread(blocking)


def context_of(files: TlsFiles) -> ssl.SSLContext:
    """Return a context of Python's TLS, which is OpenSSL; grpcio's is BoringSSL."""
    context = ssl.create_default_context(cafile=files.ca)
    if files.cert and files.key:
        context.load_cert_chain(files.cert, files.key)
    return context


async def call_by_hand(address: str, files: TlsFiles) -> plain_http2.Answer:
    port = int(address.rpartition(":")[2])
    return await asyncio.to_thread(plain_http2.call, port, STATUS, tls=context_of(files))


async def call_by_grpcurl(address: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["grpcurl", "-max-time", "5", *map(str, arguments), address, STATUS]
    return await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=30, check=False
    )


async def test_a_client_needs_tls_and_the_servers_authority(
    socket_dir: Path, authority: Authority, pair: Pair
) -> None:
    async with serving(socket_dir, pair) as address:
        await assert_served(address, files_of(authority))
        answer = await call_by_hand(address, files_of(authority))
        assert pb.StatusResponse.FromString(answer.message).pid
        # In clear, and with a client that trusts another authority.
        await assert_refused(address, None)
        await assert_refused(address, files_of(Authority(socket_dir, "other")))


async def test_tls_works_on_a_unix_socket(
    socket_dir: Path, authority: Authority, pair: Pair
) -> None:
    files = tls.TlsFiles(pair.cert, pair.key)
    async with running(socket_dir, FakeBackend(), tls=files) as (_, _, ready):
        await assert_served(ready.target, files_of(authority))


async def test_a_token_is_needed_inside_tls(
    socket_dir: Path, authority: Authority, pair: Pair
) -> None:
    async with serving(socket_dir, pair, token=TOKEN) as address:
        await assert_served(address, files_of(authority), TOKEN)
        with pytest.raises(AuthenticationError):
            await fetch_pid(address, files_of(authority))


async def test_clients_refuse_an_expired_server_certificate(
    socket_dir: Path, authority: Authority
) -> None:
    async with serving(socket_dir, authority.sign("expired", days=-1)) as address:
        await assert_refused(address, files_of(authority))
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            await call_by_hand(address, files_of(authority))


async def test_mutual_tls_needs_a_valid_client_certificate(
    socket_dir: Path, authority: Authority, pair: Pair
) -> None:
    own = authority.sign("client")
    foreign = Authority(socket_dir, "other").sign("foreign")
    async with serving(socket_dir, pair, authority.file) as address:
        await assert_served(address, files_of(authority, own))
        answer = await call_by_hand(address, files_of(authority, own))
        assert pb.StatusResponse.FromString(answer.message).pid
        for bad in (None, authority.sign("expired", days=-1), foreign):
            await assert_refused(address, files_of(authority, bad))
            # With TLS 1.3 a client learns of its refusal when it first reads.
            with pytest.raises(OSError):  # noqa: PT011 - reset, or one of many TLS alerts
                await call_by_hand(address, files_of(authority, bad))


@pytest.mark.skipif(not shutil.which("grpcurl"), reason="grpcurl is not installed")
async def test_grpcurl_needs_a_valid_client_certificate(
    socket_dir: Path, authority: Authority, pair: Pair
) -> None:
    own, expired = authority.sign("client"), authority.sign("expired", days=-1)
    trust = ("-cacert", authority.file)
    async with serving(socket_dir, pair, authority.file) as address:
        done = await call_by_grpcurl(address, *trust, "-cert", own.cert, "-key", own.key)
        assert done.returncode == 0, done.stderr
        for bad in ((), ("-cert", expired.cert, "-key", expired.key)):
            assert (await call_by_grpcurl(address, *trust, *bad)).returncode != 0
        assert (await call_by_grpcurl(address, "-plaintext")).returncode != 0


async def test_files_that_change_are_used_by_the_next_connection(
    socket_dir: Path, authority: Authority, pair: Pair
) -> None:
    other = Authority(socket_dir, "other")
    async with (
        serving(socket_dir, pair) as address,
        AsyncRunnerClient(address, tls=files_of(authority)) as open_client,
    ):
        pid = (await open_client.status()).pid
        overwrite(other.sign("next"), pair)
        await assert_served(address, files_of(other))
        await assert_refused(address, files_of(authority))
        # Open connections stay open.
        assert (await open_client.status()).pid == pid


async def test_an_expired_certificate_is_replaced_without_a_restart(
    socket_dir: Path, authority: Authority
) -> None:
    pair = authority.sign("server", days=-1)
    async with serving(socket_dir, pair) as address:
        await assert_refused(address, files_of(authority))
        overwrite(authority.sign("next"), pair)
        await assert_served(address, files_of(authority))


async def test_a_changed_client_authority_is_used_by_the_next_connection(
    socket_dir: Path, authority: Authority, pair: Pair
) -> None:
    trusted = socket_dir / "trusted.pem"
    shutil.copy(authority.file, trusted)
    other = Authority(socket_dir, "other")
    old, new = authority.sign("old"), other.sign("new")
    async with serving(socket_dir, pair, trusted) as address:
        await assert_served(address, files_of(authority, old))
        await assert_refused(address, files_of(authority, new))
        shutil.copy(other.file, trusted)
        await assert_served(address, files_of(authority, new))
        await assert_refused(address, files_of(authority, old))


async def test_half_of_a_change_keeps_the_last_good_files(
    socket_dir: Path, authority: Authority, pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "runner_common.serving.tls")
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
            await assert_served(address, files_of(authority))
            errors = [
                entry for entry in caplog.records if entry.name == "runner_common.serving.tls"
            ]
            # Logged once for each change, not for each connection.
            assert [entry.levelname for entry in errors] == ["ERROR"]
        overwrite(new, pair)
        await assert_served(address, files_of(authority))
        assert "have changed" in caplog.text


def overwrite(new: Pair, target: Pair) -> None:
    """Overwrite a certificate and key in place."""
    shutil.copy(new.cert, target.cert)
    shutil.copy(new.key, target.key)


def test_files_that_change_while_they_are_read_are_read_again(
    authority: Authority, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tls._Source(tls.TlsFiles(pair.cert, pair.key))
    source.read()
    check = tls.check_files
    overwrite(authority.sign("next"), pair)

    def change_then_check(files: tls.TlsFiles) -> None:
        overwrite(authority.sign("later"), pair)
        check(files)

    with monkeypatch.context() as patch:
        patch.setattr(tls, "check_files", change_then_check)
        assert source.fetch() is None
    assert source.fetch() is not None
    assert source.fetch() is None


def replace_by_folder(target: Path) -> None:
    target.unlink()
    target.mkdir()


BAD: dict[str, tuple[str, Callable[[Pair], object]]] = {
    "none": ("cannot be read: No such file", lambda pair: pair.cert.unlink()),
    "no key": ("cannot be read: No such file", lambda pair: pair.key.unlink()),
    "empty": ("not a certificate and its private key", lambda pair: pair.cert.write_text("")),
    "not text": ("not a certificate", lambda pair: pair.cert.write_bytes(bytes(range(256)))),
    "folder": ("Is a directory", lambda pair: replace_by_folder(pair.key)),
    "swapped": ("not a certificate", lambda pair: shutil.copy(pair.cert, pair.key)),
}


@pytest.mark.parametrize("how", BAD)
def test_unusable_files_end_the_start(pair: Pair, how: str) -> None:
    message, spoil = BAD[how]
    spoil(pair)
    with pytest.raises(BadTlsFilesError, match=message) as caught:
        server_credentials(tls.TlsFiles(pair.cert, pair.key))
    assert str(pair.cert.parent) in str(caught.value)


def test_a_key_with_a_password_does_not_prompt(authority: Authority) -> None:
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


def test_an_empty_client_authority_is_refused(pair: Pair, tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    with pytest.raises(BadTlsFilesError, match="has no certificate"):
        server_credentials(tls.TlsFiles(pair.cert, pair.key, empty))


async def test_the_error_names_the_unusable_file(socket_dir: Path, pair: Pair) -> None:
    pair.key.unlink()
    with pytest.raises(CannotListenError, match=r"server\.key cannot be read"):
        async with serving(socket_dir, pair):
            pass


@pytest.mark.parametrize(
    "argv",
    [["--tls-cert", __file__], ["--tls-key", __file__], ["--tls-client-ca", __file__]],
)
def test_certificate_and_key_options_need_each_other(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_args(argv)
    assert "--tls-cert" in capsys.readouterr().err


def test_the_options_become_tls_files(pair: Pair, tmp_path: Path) -> None:
    cert, key = str(pair.cert), str(pair.key)
    argv = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", cert]
    assert parse_args(argv).tls == tls.TlsFiles(pair.cert, pair.key, pair.cert)
    assert parse_args([]).tls is None
    for wrong in (tmp_path, tmp_path / "none"):
        with pytest.raises(SystemExit):
            parse_args(["--tls-cert", str(wrong), "--tls-key", key])


def test_a_client_certificate_needs_its_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="both of cert and key"):
        TlsFiles(cert="a")
    with pytest.raises(FileNotFoundError, match="none"):
        RunnerClient("localhost:1", tls=TlsFiles(tmp_path / "none"))
