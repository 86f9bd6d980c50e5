"""Fixtures: the tools, and the servers to call with them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.external_tools import BIN, NAMES, ROOT, TOKEN, Done, Run, ToolTarget
from support.server_child import DEADLINE_SECONDS, Child, running


@pytest.fixture(scope="session")
def run() -> Run:
    """Return a function that runs a tool; skip if the tools are not built, or fail in CI."""
    pytest.importorskip("mlx_lm", reason="starts real runners: needs the server extra")
    refuse = pytest.fail if os.environ.get("CI") else pytest.skip
    if shutil.which("go") is None:
        refuse("no go on PATH")
    if not all((BIN / name).exists() for name in NAMES):
        refuse(f"{', '.join(NAMES)} are not built: run `make tools`")

    def call(name: str, *args: str, **env: str) -> Done:
        return subprocess.run(
            [name, *args],
            cwd=ROOT,
            env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return call


@pytest.fixture(scope="session")
def places(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ToolTarget]]:
    """Start three servers: on a port, on a unix socket, and on a port with a token."""
    assert run
    logs = tmp_path_factory.mktemp("logs")
    with ExitStack() as stack:

        def start(listen: str, *args: str, **env: str) -> Child:
            model = ("--model", str(ROOT / "runner_server/demo/model"))
            child = stack.enter_context(running(logs, "--listen", listen, *model, *args, **env))
            sent = tuple(("authorization", f"Bearer {token}") for token in env.values())
            request = pb.StatusRequest()
            child.wait_for(
                lambda: (
                    child.stub.Status(request, timeout=DEADLINE_SECONDS, metadata=sent).state
                    == pb.STATE_ACTIVE
                )
            )
            return child

        tcp = start("127.0.0.1:0", "--metrics-listen", "127.0.0.1:0")
        unix = start(f"unix:{tmp_path_factory.mktemp('s')}/s")
        guarded = start("127.0.0.1:0", MLX_RUNNER_TOKEN=TOKEN)
        header = ("-expand-headers", "-H", "authorization: Bearer ${TOKEN}")
        found = re.search(r"metrics on http://([\d.:]+)/metrics", tcp.log.read_text())
        assert found
        at, behind = tcp.ready.target, guarded.ready.target
        yield {
            "tcp": ToolTarget(tcp, ("-plaintext",), at, at, metrics=found[1]),
            "unix": ToolTarget(
                unix, ("-plaintext", "-unix"), unix.ready.address, unix.ready.target
            ),
            "token": ToolTarget(guarded, ("-plaintext", *header), behind, behind, {"TOKEN": TOKEN}),
        }


@pytest.fixture(params=["tcp", "unix", "token"])
def place(request: pytest.FixtureRequest, places: dict[str, ToolTarget]) -> ToolTarget:
    """Return each of the three servers in turn."""
    return places[request.param]
