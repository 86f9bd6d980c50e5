"""Commands calling a server with a token or TLS, and ``serve``, which starts one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from runner_client.cli import serve
from runner_common.contract import TOKEN_VARIABLE
from runner_server.config import parse_args
from runner_server.transport.tls import TlsFiles
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
