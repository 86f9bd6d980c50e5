"""Commands calling a server with a token or TLS, and ``serve``, which starts one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from runner_client.cli import serve
from runner_common.contract import TOKEN_VARIABLE
from runner_common.serving.tls import TlsFiles
from runner_server.config import parse_args
from support.certificates import Authority
from support.command_line import invoke
from support.fakes import FakeBackend
from support.harness import StartServer, running

TOKEN = "correct-horse-battery-staple"  # noqa: S105 - of a test


async def run_command(*arguments: object, **environment: str) -> Result:
    return await asyncio.to_thread(
        invoke, *map(str, arguments), environment={TOKEN_VARIABLE: "", **environment}
    )


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    return file


async def test_status_sends_the_token(start_server: StartServer, token_file: Path) -> None:
    server = await start_server(listen="127.0.0.1:0", token=TOKEN)
    address = server.ready.target
    assert (await run_command("status", address, "--token-file", token_file)).exit_code == 0
    assert (await run_command("status", address, **{TOKEN_VARIABLE: TOKEN})).exit_code == 0
    refused = await run_command("status", address)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "requires a token and the call has none" in refused.stderr
    assert f"by --token-file or {TOKEN_VARIABLE}" in refused.stderr
    wrong = await run_command("status", address, **{TOKEN_VARIABLE: TOKEN + "x"})
    assert "a different one" in wrong.stderr
    assert TOKEN not in wrong.stderr


async def test_tokenize_sends_the_token(start_server: StartServer, token_file: Path) -> None:
    server = await start_server(token=TOKEN)
    where = ("--address", server.ready.target, "--token-file", token_file)
    # The call gets past the token check to the missing model.
    assert "no model is loaded" in (await run_command("tokenize", *where, "x")).stderr


async def test_status_over_mutual_tls(socket_dir: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    pair, own = authority.sign("server"), authority.sign("client")
    files = TlsFiles(pair.cert, pair.key, authority.file)
    parts = running(socket_dir, FakeBackend(), listen="localhost:0", tls=files)
    async with parts as (_, _, ready):
        trust = ("--tls-ca", authority.file)
        mine = ("--tls-cert", own.cert, "--tls-key", own.key)
        assert (await run_command("status", ready.target, *trust, *mine)).exit_code == 0
        assert (await run_command("status", ready.target, *trust)).exit_code == 1
        assert (await run_command("status", ready.target)).exit_code == 1


async def test_a_wrong_use_of_tls_is_explained_in_one_sentence(
    start_server: StartServer, socket_dir: Path, tmp_path: Path
) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    pair = authority.sign("server")
    plain = (await start_server(listen="127.0.0.1:0")).ready.target
    unencrypted = await run_command("status", plain, "--tls-ca", authority.file)
    assert unencrypted.stderr == (
        f"error: the runner at {plain} does not encrypt: call it without certificates (--tls-ca)\n"
    )
    files = TlsFiles(pair.cert, pair.key, None)
    async with running(socket_dir, FakeBackend(), listen="localhost:0", tls=files) as (_, _, ready):
        # gRPC reports one of several addresses of a name.
        address = f"127.0.0.1:{ready.target.rpartition(':')[2]}"
        closed = await run_command("status", address)
        assert f"the runner at {address} closes unencrypted connections" in closed.stderr
        assert closed.stderr.endswith("to trust it by (--tls-ca)\n")
        untrusted = await run_command("status", address, "--tls-ca", stranger.file)
        assert "was not signed by a trusted authority" in untrusted.stderr
    assert (unencrypted.exit_code, closed.exit_code, untrusted.exit_code) == (1, 1, 1)


def test_a_file_without_a_certificate_is_wrong_usage(token_file: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    result = invoke("status", "localhost:1", "--tls-ca", str(token_file))
    assert result.exit_code == 2
    assert f"{token_file} has no certificate in PEM form" in result.stderr
    own = ("--tls-cert", str(authority.sign("client").cert), "--tls-key", str(token_file))
    result = invoke("status", "localhost:1", "--tls-ca", str(authority.file), *own)
    assert result.exit_code == 2
    assert f"and {token_file} are not a certificate and its private key" in result.stderr


def test_a_token_that_the_server_refuses_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "abc")
    with pytest.raises(SystemExit) as exit_:
        parse_args([])
    first, last = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2
    assert first.startswith(f"error: the token in {TOKEN_VARIABLE} has 3 characters")
    assert last == "see mlx-runner serve --help"


@pytest.mark.parametrize("verbosity", [None, "ERROR"])
async def test_the_log_of_grpc_is_off_unless_wanted(
    start_server: StartServer, tmp_path: Path, verbosity: str | None
) -> None:
    address = (await start_server(listen="127.0.0.1:0")).ready.target
    code = (
        "import os, sys, atexit; from runner_common import console\n"
        "atexit.register(lambda: print(os.environ.get('GRPC_VERBOSITY')))\n"
        f"sys.argv[1:] = ['status', {address!r}, '--tls-ca', {str(Authority(tmp_path).file)!r}]\n"
        "console.main()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    given = {"GRPC_VERBOSITY": verbosity} if verbosity else {}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        env={**environment, **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await process.communicate()
    # A server that the command starts would not inherit the setting.
    assert out.decode().split() == [str(verbosity)]
    assert verbosity or len(err.decode().splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "localhost:1", "--tls-cert", "FILE", "--tls-key", "FILE"],
        ["status", "localhost:1", "--tls-ca", "FILE", "--tls-cert", "FILE"],
        ["status", "localhost:1", "--tls-key", "FILE"],
        ["status", "localhost:1", "--token-file", "EMPTY"],
        ["status", "localhost:1", "--token", TOKEN],
        ["tokenize", "--model", "m", "--token-file", "FILE", "x"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str], token_file: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("")
    files = {"FILE": str(token_file), "EMPTY": str(empty)}
    result = invoke(*(files.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert TOKEN not in result.output


def test_serve_passes_on_token_and_tls_files(
    token_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    became: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(serve, "_become", lambda *taken: became.append(taken))
    pair = Authority(tmp_path).sign("server")
    files: dict[str, Any] = {"--tls-cert": pair.cert, "--tls-key": pair.key}
    files |= {"--tls-client-ca": tmp_path / "authority.pem", "--token-file": token_file}
    given = [str(part) for option in files.items() for part in option]
    variable = {TOKEN_VARIABLE: "of-the-environment-123"}
    result = invoke(
        "serve",
        "--listen",
        "0.0.0.0:0",
        *given,
        "--model-root",
        str(tmp_path),
        environment=variable,
    )
    assert result.exit_code == 0, result.output
    line, environment = became[0]
    config = parse_args(line[line.index("--listen") :])
    assert config.tls == TlsFiles(pair.cert, pair.key, tmp_path / "authority.pem")
    assert (config.token, config.model_root) == (TOKEN, tmp_path.resolve())
    assert environment[TOKEN_VARIABLE] == variable[TOKEN_VARIABLE]
    assert not any(TOKEN in argument for argument in line)
