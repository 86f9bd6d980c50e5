"""Fixtures: each client of the selected tests, built and run once."""

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
from support.user_home import toolchain_variables

_OPTION = "--languages"
_RUNS = pytest.StashKey[dict[str, Run]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that selects languages."""
    parser.addoption(_OPTION, default="", help="take only these languages, separated by blanks")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of languages that were not asked for.

    Raises:
        UsageError: A name is not that of a language.
    """
    wanted = str(config.getoption(_OPTION)).replace(",", " ").split()
    if unknown := set(wanted) - {each.name for each in LANGUAGES}:
        names = ", ".join(each.name for each in LANGUAGES)
        raise pytest.UsageError(f"{_OPTION}: no {', '.join(sorted(unknown))}; there are {names}")
    others = [item for item in items if wanted and _language(item) not in {None, *wanted}]
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


def _language(item: pytest.Item) -> str | None:
    """Return the language of a test; None for a test of all languages."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    language = parameters.get("language")
    return language.toolchain.name if isinstance(language, Language) else None


@pytest.fixture(scope="session", autouse=True)
def _user_toolchains() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in toolchain_variables().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """Create a directory with a short path, because paths of sockets are limited."""
    path = Path(tempfile.mkdtemp(prefix="mr-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def servers(folder: Path) -> Iterator[dict[str, Server]]:
    """Start the servers shared by the clients."""
    with shared_servers(folder) as started:
        yield started


@pytest.fixture(scope="session")
def runs(
    request: pytest.FixtureRequest, servers: dict[str, Server], folder: Path
) -> dict[str, Run]:
    """Run the clients of the selected tests concurrently; return the runs by language."""
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
        if isinstance(item, pytest.Function)
        and item.originalname == "test_the_client_meets_the_expectations_of_a_scenario"
    }
    return [each for each in LANGUAGES if each in asked]


@pytest.fixture
def need() -> Callable[[Language], None]:
    """Return a function that skips a test without its toolchain, or fails in CI."""

    def need(language: Language) -> None:
        if not (missing := language.missing()):
            return
        reason = f"no {' and no '.join(missing)} on PATH"
        if os.environ.get("CI"):
            pytest.fail(f"{language.name}: {reason}, which CI must have", pytrace=False)
        pytest.skip(reason)

    return need


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the durations of builds and clients."""
    for name, run in config.stash.get(_RUNS, {}).items():
        terminalreporter.line(
            f"{name}: built in {run.build_seconds:.0f} s, ran for {run.run_seconds:.0f} s"
        )
