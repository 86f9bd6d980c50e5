"""The clients of the suite: their toolchains, builds and runs."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interop.judge import read_output
from interop.servers import DEMO_MODEL, ROOT, Server, own_servers

Json = dict[str, Any]

CLIENTS = Path(__file__).parent / "clients"
SCENARIOS: list[Json] = [
    scenario
    for file in sorted((Path(__file__).parent / "scenarios").glob("*.json"))
    for scenario in json.loads(file.read_text())
]

_BUILD_SECONDS = 1200.0
_RUN_SECONDS = 300.0
_LAST_CHARS = 3000
# Each build uses all cores.
_building = threading.Lock()


class Failed(Exception):
    """A client that cannot be built, or that breaks the contract."""


@dataclass(frozen=True)
class Language:
    """A client in one language.

    Attributes:
        name: The name of the client's folder.
    """

    name: str

    @property
    def folder(self) -> Path:
        """The folder of the client."""
        return CLIENTS / self.name

    @property
    def toolchain(self) -> Language:
        """The client that needs the same commands: that of ``go`` for the example ``go-pool``."""
        return self if self.folder.is_dir() else Language(self.name.partition("-")[0])

    def missing(self) -> list[str]:
        """Return the required commands that are not installed."""
        needs = (self.folder / "needs").read_text().split()
        return [command for command in needs if not shutil.which(command, path=_path())]

    def build(self) -> float:
        """Build the client in this language once; return the duration in seconds.

        Raises:
            Failed: The build failed.
        """
        with _building:
            return _built(self)


@functools.cache
def _built(language: Language) -> float:
    if not (language.folder / "build").exists():
        return 0.0
    begin = time.monotonic()
    run(["./build"], f"build of {language.name}", _BUILD_SECONDS, language.folder)
    return time.monotonic() - begin


@dataclass
class Run:
    """The run of a client.

    Attributes:
        language: The client's language.
        build_seconds: The duration of the build.
        run_seconds: The duration of all scenarios.
        results: The results, by scenario.
        pings: The number of pings out of silence that reached the client's server.
        error: The reason why there are no results; empty if there are.
    """

    language: Language
    build_seconds: float = 0.0
    run_seconds: float = 0.0
    results: dict[str, list[Json]] = field(default_factory=dict)
    pings: int = 0
    error: str = ""


def run_client(language: Language, shared: dict[str, Server], folder: Path) -> Run:
    """Build a client and run all scenarios.

    Args:
        language: The client's language.
        shared: The servers shared by all clients.
        folder: A new folder for the files of this client.
    """
    outcome = Run(language)
    try:
        outcome.build_seconds = language.build()
        with own_servers(folder) as own:
            begin = time.monotonic()
            output = _call_client(language, shared | own, folder)
            outcome.run_seconds = time.monotonic() - begin
            outcome.pings = sum(each.relay.pings for each in own.values() if each.relay)
        outcome.results = read_output(output)
    except (Failed, ValueError) as error:
        outcome.error = str(error)
    return outcome


def _call_client(language: Language, servers: dict[str, Server], folder: Path) -> str:
    scenarios, addresses = folder / "scenarios.json", folder / "servers.json"
    text = json.dumps(SCENARIOS, ensure_ascii=False, indent=1)
    scenarios.write_text(text.replace("$DEMO_MODEL", str(DEMO_MODEL)))
    addresses.write_text(json.dumps({name: each.entry() for name, each in servers.items()}))
    command = [str(language.folder / "run"), str(scenarios), str(addresses)]
    return run(command, f"client of {language.name}", _RUN_SECONDS, folder)


def run(command: list[str], what: str, limit_seconds: float, folder: Path) -> str:
    """Run a program and return the output.

    Raises:
        Failed: The program failed or took too long; the message has the end of the output.
    """
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=os.environ | {"PATH": _path()},
            capture_output=True,
            encoding="utf-8",
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        wrote = (error.stderr or b"").decode(errors="replace")[-_LAST_CHARS:]
        raise Failed(f"the {what} did not end within {limit_seconds:g} s:\n{wrote}") from None
    if done.returncode:
        wrote = (done.stderr + done.stdout)[-_LAST_CHARS:]
        raise Failed(f"the {what} ended with {done.returncode}:\n{wrote}")
    return done.stdout


def _path() -> str:
    """Return PATH with the commands of this environment first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


LANGUAGES = [Language(each.parent.name) for each in sorted(CLIENTS.glob("*/run"))]
EXAMPLES = ROOT / "examples"
