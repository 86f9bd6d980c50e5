"""Empty environments, in which the packages are installed."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
NEWEST: tuple[str, ...] = ("--upgrade", "--upgrade-strategy", "eager")
LOWEST: tuple[str, ...] = ("--constraint", str(ROOT / "tests/floor.txt"))


def told(command: list[str | Path], cwd: Path, timeout: float = 600) -> str:
    """What a command says that must succeed, far from the checkout.

    Args:
        command: Program and arguments.
        cwd: The folder it runs in.
        timeout: How long it may take, in seconds.
    """
    # Nothing of this process may be found by it: neither its packages nor its settings.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command} exited with {done.returncode}:\n{done.stdout}"
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A Python of its own, and an empty folder.

    Attributes:
        folder: Where the environment is.
        python: Its interpreter.
    """

    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin/python"

    def install(self, *what: str) -> None:
        """Installs packages with pip."""
        told([self.python, "-m", "pip", "install", "--quiet", *what], self.folder)

    def run(self, *arguments: str | Path, timeout: float = 120) -> str:
        """What its interpreter says, run in its folder; it must exit with 0."""
        return told([self.python, "-W", "error", *arguments], self.folder, timeout)

    def versions(self) -> dict[str, str]:
        """What is installed, by its canonical name."""
        code = (
            "import importlib.metadata as m;[print(d.name, d.version) for d in m.distributions()]"
        )
        found = dict(line.split() for line in self.run("-c", code).splitlines())
        return {canonicalize_name(name): version for name, version in found.items()}
