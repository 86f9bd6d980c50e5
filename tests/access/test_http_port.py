"""The HTTP port: TLS with the files of gRPC, and addresses that it refuses."""

from __future__ import annotations

import asyncio
import json
import shutil
import ssl
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from runner_common.serving.listen import CannotListenError
from runner_common.serving.tls import TlsFiles
from support.certificates import Authority
from support.fakes import FakeBackend
from support.harness import running


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def fetch(url: str, context: ssl.SSLContext) -> Any:
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    with opener.open(f"{url}/v1/models", timeout=10) as answer:
        return json.load(answer)


async def test_new_connections_use_the_latest_certificate(
    socket_dir: Path, authority: Authority
) -> None:
    pair, other = authority.sign("server"), Authority(authority.file.parent, "other")
    next_ = other.sign("next")
    trusted, later = (ssl.create_default_context(cafile=each.file) for each in (authority, other))
    tls = TlsFiles(pair.cert, pair.key)
    async with running(socket_dir, FakeBackend(), http=("localhost", 0), tls=tls) as (app, _, _):
        assert app._http
        url = app._http.url
        empty = {"object": "list", "data": []}
        assert await asyncio.to_thread(fetch, url, trusted) == empty
        shutil.copy(next_.cert, pair.cert)
        # Certificate and key do not belong together yet.
        assert await asyncio.to_thread(fetch, url, trusted) == empty
        shutil.copy(next_.key, pair.key)
        assert await asyncio.to_thread(fetch, url, later) == empty


async def test_clients_need_a_certificate_if_the_server_says_so(
    socket_dir: Path, authority: Authority
) -> None:
    pair, own = authority.sign("server"), authority.sign("client")
    tls = TlsFiles(pair.cert, pair.key, authority.file)
    context = ssl.create_default_context(cafile=authority.file)
    async with running(socket_dir, FakeBackend(), http=("localhost", 0), tls=tls) as (app, _, _):
        assert app._http
        with pytest.raises(OSError, match=r"certificate|reset|closed"):
            await asyncio.to_thread(fetch, app._http.url, context)
        context.load_cert_chain(own.cert, own.key)
        assert (await asyncio.to_thread(fetch, app._http.url, context))["data"] == []


async def test_an_address_open_to_other_machines_needs_a_token(socket_dir: Path) -> None:
    with pytest.raises(CannotListenError, match=r"--http 0\.0\.0\.0:0 is open to other machines"):
        async with running(socket_dir, FakeBackend(), http=("0.0.0.0", 0)):  # noqa: S104 - refused
            pass


async def test_an_address_in_use_is_refused(socket_dir: Path) -> None:
    async with running(socket_dir, FakeBackend(), http=("127.0.0.1", 0)) as (app, _, _):
        assert app._http
        port = int(app._http.url.rpartition(":")[2])
        with pytest.raises(CannotListenError, match="--http 127"):
            async with running(socket_dir, FakeBackend(), http=("127.0.0.1", port)):
                pass
