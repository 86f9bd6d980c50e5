"""Addresses of runners: the forms accepted, and one sentence for each mistake."""

from __future__ import annotations

import pytest

from runner_client import AsyncRunnerClient, RunnerClient
from runner_client.rpc.transport.address import parse_address
from support.command_line import invoke

EXPECTED = "; expected HOST:PORT, [IPV6]:PORT or unix:/path"

MISTAKES = {
    "localhost": "the port is missing",
    "localhost:": "the port is missing",
    "[::1]": "the port is missing",
    "[::1]:": "the port is missing",
    "localhost:http": "the port 'http' is not a number",
    "localhost:\u0661": "the port '\u0661' is not a number",
    "localhost:-1": "the port '-1' is not a number",
    "localhost:0": "port 0 is only for a server that listens on any free port",
    "localhost:65536": "the port is 65536, but at most 65535 is possible",
    f"localhost:{'9' * 5000}": "but at most 65535 is possible",
    "dns:///localhost:65536": "the port is 65536, but at most 65535 is possible",
    ":50051": "the host is missing",
    "my host:1": "'my host' is not a host",
    "::1:50051": "an IPv6 address needs brackets around it",
    "[::g]:1": "'::g' is not an IPv6 address",
    "[::1:1": "the bracket of the IPv6 address does not end",
    "http://localhost:1": "an address is not a URL, so http:// must go (give localhost:1)",
    "grpc://localhost:1/": "an address is not a URL, so grpc:// must go (give localhost:1)",
    "https://localhost": "an address is not a URL, so https:// must go",
    "http://[::1": "an address is not a URL, so http:// must go",
    "localhost:1/": "nothing may follow the port (give localhost:1)",
    "org/name": "it is a path or a hub id",
    "/run/runner.sock": "the path of a socket needs unix: before it",
    "unix:": "the path of the socket is missing",
    "unix://run/s": "after unix:, a path begins with one slash (give unix:/run/s)",
}


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1:50051",
        "localhost:1",
        "runner_1.example.:65535",
        "[::1]:50051",
        "[fe80::1%eth0]:50051",
        "unix:/run/runner.sock",
        "unix:runner.sock",
        "unix:///run/runner.sock",
        "unix:/run/with space:99999",
        "unix-abstract:runner",
        "dns:///localhost:50051",
        "ipv4:127.0.0.1:50051,127.0.0.1:50052",
    ],
)
def test_addresses_are_passed_to_grpc_unchanged(address: str) -> None:
    assert parse_address(address) == address


@pytest.mark.parametrize(
    ("address", "problem"), MISTAKES.items(), ids=[key[:24] for key in MISTAKES]
)
def test_a_mistake_is_named_in_one_sentence(address: str, problem: str) -> None:
    with pytest.raises(ValueError, match="is not the address of a runner") as caught:
        parse_address(address)
    said = str(caught.value)
    assert said.startswith(f"{address!r} is not the address of a runner: ")
    assert said.endswith(f"{problem}{EXPECTED}")


async def test_both_clients_refuse_a_mistake() -> None:
    for client in (RunnerClient, AsyncRunnerClient):
        with pytest.raises(ValueError, match="the port is missing; expected HOST:PORT"):
            client("localhost")


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "localhost"),
        ("trim", "localhost"),
        ("load", "localhost", "model"),
        ("unload", "localhost"),
        ("run", "--address", "localhost", "prompt"),
        ("estimate", "model", "--address", "localhost"),
        ("tokenize", "localhost", "text"),
        ("tokenize", "--address", "localhost", "text"),
    ],
    ids=" ".join,
)
def test_every_command_refuses_a_mistake_alike(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert f"'localhost' is not the address of a runner: the port is missing{EXPECTED}" in (
        result.stderr
    )
