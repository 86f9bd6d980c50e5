"""Runners in real child processes whose steps go wrong when a request says so."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from runner_client import Options, RunnerProcess, errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

TESTS = Path(__file__).parents[1]
BREAK = "break"
"""The id of a request whose step goes wrong."""

LONG = Options(num_predict=100_000, temperature=0)

NAMED_REQUESTS = """
from runner_server.engine.generation_request import GenerationRequest
from runner_server.telemetry.call_record import current_call
init = GenerationRequest.__init__

def named(self, *args):
    init(self, *args)
    self.name = current_call().request_id

GenerationRequest.__init__ = named
"""
"""Code that gives each request of the engine the id that its caller chose."""

_HOOK = (
    NAMED_REQUESTS
    + """
from runner_server.engine.thread import EngineThread
step = EngineThread._step

def broken(self, batch):
    if any(each.name == {name!r} for each in self._scheduler.running):
{what}
    return step(self, batch)

EngineThread._step = broken
"""
)

_FAKE_ENGINE = """
import asyncio, logging, sys
sys.path.insert(0, {tests!r})
from support.fakes import FakeBackend
from runner_server.app import serve
from runner_server.config import parse_args
{setup}
logging.basicConfig(level="INFO", stream=sys.stderr)
sys.exit(asyncio.run(serve(parse_args(), FakeBackend())))
"""


def breaking(what: str) -> str:
    """Code that has the engine's thread do something in the step of a request named ``BREAK``."""
    return _HOOK.format(name=BREAK, what=textwrap.indent(textwrap.dedent(what).strip(), " " * 8))


def hooked(folder: Path, code: str) -> dict[str, str]:
    """Variables with which a Python process runs code before anything else."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def fake_engine(setup: str = "") -> list[str]:
    """The command of the real server with a fake model library; its options may follow.

    Args:
        setup: Code that it runs before it serves.
    """
    return [sys.executable, "-c", _FAKE_ENGINE.format(tests=str(TESTS), setup=setup)]


def use_fake_engine(monkeypatch: pytest.MonkeyPatch, setup: str = "") -> None:
    """Lets processes start the real server with a fake model library.

    Estimates are made from the headers: only the fake library can host these models.

    Args:
        monkeypatch: Undoes it.
        setup: Code that the child runs before it serves.
    """
    monkeypatch.setattr("runner_client.memory.estimation.can_ask", lambda: False)
    command = [*fake_engine(setup), "--exit-with-parent", "--listen"]
    monkeypatch.setattr(
        "runner_client.process.launch.server_command", lambda listen: [*command, listen]
    )


def end_of(call: Callable[[], object]) -> Exception | None:
    """What a call raised of this library's; None if it succeeded."""
    try:
        call()
    except errors.RunnerError as error:
        return error
    return None


@contextmanager
def in_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for calls that block; those of a child that is ended end with it."""
    with ThreadPoolExecutor(count) as pool:
        yield pool


def pid_of(runner: RunnerProcess) -> int:
    """The id of a child that was started."""
    assert runner.pid is not None
    return runner.pid


def held(pid: int) -> tuple[int, int, int]:
    """Resident bytes, open descriptors and threads of a process."""
    process = psutil.Process(pid)
    return process.memory_info().rss, process.num_fds(), process.num_threads()
