"""Fresh virtual environments in which the packages are installed."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
NEWEST: tuple[str, ...] = ("--upgrade", "--upgrade-strategy", "eager")
LOWEST: tuple[str, ...] = ("--constraint", str(ROOT / "tests/floor.txt"))


def checked_output(command: list[str | Path], cwd: Path, timeout: float = 600) -> str:
    """Run a command, which must succeed, outside the checkout and return its output.

    Args:
        command: Program and arguments.
        cwd: Working directory.
        timeout: Time limit, in seconds.
    """
    # The command must not find the packages or settings of this process.
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
    """Virtual environment for installed packages.

    Attributes:
        folder: Root of the environment, and working directory of commands.
        python: Interpreter of the environment.
    """

    folder: Path

    @property
    def python(self) -> Path:
        """Interpreter of the environment."""
        return self.folder / "bin/python"

    def install(self, *what: str) -> None:
        """Install packages with pip."""
        checked_output([self.python, "-m", "pip", "install", "--quiet", *what], self.folder)

    def run(self, *arguments: str | Path, timeout: float = 120) -> str:
        """Run the interpreter, which must exit with 0, and return the output."""
        return checked_output([self.python, "-W", "error", *arguments], self.folder, timeout)

    def versions(self) -> dict[str, str]:
        """Return the installed versions by canonical name."""
        code = (
            "import importlib.metadata as m;[print(d.name, d.version) for d in m.distributions()]"
        )
        found = dict(line.split() for line in self.run("-c", code).splitlines())
        return {canonicalize_name(name): version for name, version in found.items()}
