"""The commands in docs/debugging.md and README, and the output shown there."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.external_tools import BIN, NAMES, ROOT, Run, ToolTarget
from support.server_child import BREAK_STEPS, DEADLINE_SECONDS, Child, running
from support.transcripts import Step, console_blocks, difference

DOCUMENT = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = console_blocks(DOCUMENT)
HANGS = BREAK_STEPS.format(what="import threading; threading.Event().wait()")


@pytest.fixture(scope="session")
def stuck(
    places: dict[str, ToolTarget], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Child]:
    """Start a runner with one slot and a hanging step; one request runs, another waits."""
    assert places
    logs = tmp_path_factory.mktemp("stuck")
    with running(logs, code=HANGS) as child:
        child.load(ROOT / "runner_server/demo/model", parallel=1)
        for _ in range(2):
            child.complete(5)
        child.wait_for(lambda: child.status().queued_count == 1)
        assert child.status().state == pb.STATE_ACTIVE
        yield child


@pytest.fixture(scope="session")
def stand_ins(
    places: dict[str, ToolTarget], stuck: Child, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Return the real addresses and files by the names in the document."""
    own = tmp_path_factory.mktemp("own")
    token = own / "token"
    token.write_text(places["token"].env["TOKEN"])
    # The document shows a status after some work, and a log with a failure.
    seen = places["tcp"].child
    assert list(seen.complete(20))
    with pytest.raises(grpc.RpcError):
        list(seen.stub.Completion(pb.CompletionRequest(), timeout=DEADLINE_SECONDS))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        yield {
            "127.0.0.1:50051": places["tcp"].target,
            "/run/mlx/runner.sock": places["unix"].address,
            "127.0.0.1:50052": places["token"].target,
            "127.0.0.1:50053": f"127.0.0.1:{unused.getsockname()[1]}",
            "127.0.0.1:50054": stuck.ready.target,
            "127.0.0.1:9464": places["tcp"].metrics,
            "/run/mlx/token": str(token),
            "/run/mlx/metadata.json": str(own / "metadata.json"),
            "/var/log/mlx-runner.log": str(places["tcp"].child.log),
            "/srv/demo/model": str(ROOT / "runner_server/demo/model"),
        }


def run_command(command: str, before: list[Step], stand_ins: dict[str, str]) -> str:
    """Run a command after the exports of the block; return the output."""
    script = "\n".join([*(s.command for s in before if s.command.startswith("export")), command])
    for name, real in stand_ins.items():
        script = script.replace(name, real)
    path = os.pathsep.join([str(BIN), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-c", script],  # noqa: S607 - the user's bash
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    printed = done.stdout
    for name, real in stand_ins.items():
        printed = printed.replace(real, name)
    return printed


def test_the_document_has_transcripts_of_every_server() -> None:
    assert sum(len(block) for block in BLOCKS) > 15
    for address in ("127.0.0.1:50051", "/run/mlx/runner.sock", "127.0.0.1:50052"):
        assert any(address in step.command for block in BLOCKS for step in block)


def test_the_documented_versions_are_the_tested_ones() -> None:
    found = re.findall(r"^go install (\S+)@(\S+)", DOCUMENT, re.MULTILINE)
    assert len(found) == len(NAMES)
    pins = "\n".join((BIN.parent / name / "go.mod").read_text() for name in NAMES)
    for path, version in found:
        module = "/".join(path.split("/")[:3])
        assert f"\t{path}\n" in pins or f"tool {path}\n" in pins
        assert f"\t{module} {version} " in pins


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block[-1].command[:40])
def test_the_commands_print_the_documented_output(
    block: list[Step], stand_ins: dict[str, str]
) -> None:
    for number, step in enumerate(block):
        printed = run_command(step.command, block[:number], stand_ins)
        end = time.monotonic() + DEADLINE_SECONDS
        # A log line may be written after the response of its call.
        while "/var/log" in step.command and not printed and time.monotonic() < end:
            printed = run_command(step.command, block[:number], stand_ins)
        assert not difference(step.output, printed), step.command


def test_the_commands_of_the_readme_print_the_documented_output(run: Run, tmp_path: Path) -> None:
    """README shows the output of a new server."""
    assert run
    steps = [
        s for block in console_blocks(README) for s in block if s.command.startswith("grpcurl")
    ]
    assert len(steps) == 2
    with running(tmp_path, "--model", str(ROOT / "runner_server/demo/model")) as child:
        child.wait_for(lambda: child.status().state == pb.STATE_ACTIVE)
        for step in steps:
            printed = run_command(step.command, [], {"127.0.0.1:50051": child.ready.target})
            assert not difference(step.output, printed), step.command
