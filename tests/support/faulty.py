"""Runners in real child processes whose steps fail when a request asks for a failure."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from runner_client import RunnerProcess, errors

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pytest

TESTS = Path(__file__).parents[1]
BREAK = "break"
"""Id of a request whose step fails."""

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
run = EngineThread._run

def broken(self, item, executor):
    if any(each.name == {name!r} for each in self._scheduler.running):
{what}
    return run(self, item, executor)

EngineThread._run = broken
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
    """Return code which runs ``what`` in every step with a request whose id is ``BREAK``."""
    return _HOOK.format(name=BREAK, what=textwrap.indent(textwrap.dedent(what).strip(), " " * 8))


def hooked(folder: Path, code: str) -> dict[str, str]:
    """Return environment variables with which a Python process runs ``code`` at startup."""
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def fake_engine(setup: str = "") -> list[str]:
    """Return the command of the real server with a fake model library.

    Options of the server may be appended.

    Args:
        setup: Code to run before serving.
    """
    return [sys.executable, "-c", _FAKE_ENGINE.format(tests=str(TESTS), setup=setup)]


def use_fake_engine(monkeypatch: pytest.MonkeyPatch, setup: str = "") -> None:
    """Make runner processes start the real server with a fake model library.

    Estimates come from the file headers, since only the fake library can host these models.

    Args:
        monkeypatch: Restores the command of the server after the test.
        setup: Code that the child runs before serving.
    """
    monkeypatch.setattr("runner_client.memory.estimation.can_ask", lambda: False)
    command = [*fake_engine(setup), "--exit-with-parent", "--listen"]
    monkeypatch.setattr(
        "runner_client.process.launch.server_command", lambda listen: [*command, listen]
    )


def end_of(call: Callable[[], object]) -> Exception | None:
    """Return the library error raised by a call, or None if the call succeeded."""
    try:
        call()
    except errors.RunnerError as error:
        return error
    return None


@contextmanager
def in_threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a thread pool for blocking calls; ending the child ends the calls."""
    with ThreadPoolExecutor(count) as pool:
        yield pool


def pid_of(runner: RunnerProcess) -> int:
    """Return the process id of a started child."""
    assert runner.pid is not None
    return runner.pid


def held(pid: int) -> tuple[int, int, int]:
    """Return the resident bytes, open descriptors and threads of a process."""
    process = psutil.Process(pid)
    return process.memory_info().rss, process.num_fds(), process.num_threads()
