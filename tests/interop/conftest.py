"""Fixtures: every client that a selected test asks for, built and run once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from interop.languages import LANGUAGES, Language, Run, run_client
from interop.servers import Server, shared_servers

_RUNS = pytest.StashKey[dict[str, Run]]()


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """A fresh directory with a short path: a socket's path has little room."""
    path = Path(tempfile.mkdtemp(prefix="mr-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def servers(folder: Path) -> Iterator[dict[str, Server]]:
    """The servers that clients share."""
    with shared_servers(folder) as started:
        yield started


@pytest.fixture(scope="session")
def runs(
    request: pytest.FixtureRequest, servers: dict[str, Server], folder: Path
) -> dict[str, Run]:
    """What the clients did that selected tests ask for, by language, side by side."""
    wanted = [each for each in _selected(request.session) if not each.missing()]
    for each in wanted:
        (folder / each.name).mkdir()
    with ThreadPoolExecutor(max(1, len(wanted))) as pool:
        done = list(pool.map(lambda each: run_client(each, servers, folder / each.name), wanted))
    found = request.config.stash[_RUNS] = {each.language.name: each for each in done}
    return found


def _selected(session: pytest.Session) -> list[Language]:
    asked = {
        item.callspec.params["language"]
        for item in session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_scenario"
    }
    return [each for each in LANGUAGES if each in asked]


@pytest.fixture
def need() -> Callable[[Language], None]:
    """Skips a test whose language is not installed; in CI it fails instead."""

    def need(language: Language) -> None:
        if not (missing := language.missing()):
            return
        reason = f"no {' and no '.join(missing)} on PATH"
        if os.environ.get("CI"):
            pytest.fail(f"{language.name}: {reason}, and CI is to have it", pytrace=False)
        pytest.skip(reason)

    return need


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Tells how long builds and clients took."""
    for name, run in config.stash.get(_RUNS, {}).items():
        terminalreporter.line(
            f"{name}: built in {run.build_seconds:.0f} s, ran for {run.run_seconds:.0f} s"
        )
