"""Start of the server: command line, listen address and required packages."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner_client.errors import (
    NotSupportedError,
    RunnerUnavailableError,
    UnsupportedPlatformError,
)
from runner_common.extras import install_advice
from runner_common.interpreter import NoInterpreterError, interpreter

Listen = Literal["tcp", "unix"]

_PLATFORMS = {("Darwin", "arm64"), ("Linux", "x86_64"), ("Linux", "aarch64")}
"""Platforms for which PyPI has MLX with a backend. The Windows wheels need a backend that no
extra of MLX installs."""

_SERVER_PACKAGES = (
    *("runner_server", "mlx", "mlx_lm"),
    *("grpc_health", "grpc_reflection", "grpc_status"),
)

_SOCKET_PATH_BYTES = 103
"""The longest path of a unix socket that works everywhere: 103 on macOS, 107 on Linux."""


def check_platform() -> None:
    """Refuse a machine not supported by MLX.

    Raises:
        UnsupportedPlatformError: The machine is neither macOS on Apple silicon nor Linux on x86-64
            or arm64.
    """
    here = (platform.system(), platform.machine())
    if here not in _PLATFORMS:
        raise UnsupportedPlatformError(
            f"a runner needs MLX, which does not run on {here[0]} {here[1]}; use macOS on Apple "
            f"silicon (with an arm64 Python) or Linux on x86-64 or arm64 (on Windows: WSL 2). "
            f"A client of a runner on another machine works here"
        )


def server_program() -> list[str]:
    """Return the command of the server, without options.

    Raises:
        NotSupportedError: The server's packages are not installed.
        RunnerUnavailableError: No Python interpreter is available: this one is embedded or frozen.
    """
    try:
        python = interpreter()
    except NoInterpreterError as error:
        raise RunnerUnavailableError(
            f"cannot start a runner: {error}; start `python -m runner_server` yourself, with a "
            "Python that has mlx-grpc-runner installed, and use RunnerClient"
        ) from error
    missing = [name for name in _SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise NotSupportedError(
            f"this Python has no {', '.join(missing)}, which a runner needs: "
            f"{install_advice('cpu')} on Linux (or cuda12, cuda13), with server on macOS"
        )
    # -P: do not import a file of the current directory that is named like a module.
    return [python, "-P", "-m", "runner_server"]


def server_command(listen: str) -> list[str]:
    """Return the command line of a server tied to the lifetime of this process.

    Args:
        listen: ``HOST:PORT`` or ``unix:/path``.

    Raises:
        NotSupportedError: The server's packages are not installed.
        RunnerUnavailableError: No Python interpreter is available.
    """
    return [*server_program(), "--listen", listen, "--exit-with-parent"]


@dataclass(frozen=True)
class ListenAddress:
    """Listen address of a child."""

    argument: str
    """The value of ``--listen``."""
    folder: Path | None
    """The socket's own folder, accessible to this user only; None for TCP."""

    @classmethod
    def make(cls, listen: Listen) -> ListenAddress:
        """Choose an address: a port picked by the child, or a socket in a new folder.

        Raises:
            ValueError: ``listen`` is neither "tcp" nor "unix".
            RunnerUnavailableError: The folder cannot be created.
        """
        if listen == "tcp":
            return cls("127.0.0.1:0", None)
        if listen != "unix":
            raise ValueError(f'listen must be "tcp" or "unix", not {listen!r}')
        try:
            folder = _private_folder()
        except OSError as error:
            raise RunnerUnavailableError(
                f"cannot create a folder for the runner's socket ({error}); set TMPDIR to a "
                'writable folder, or use listen="tcp"'
            ) from error
        return cls(f"unix:{folder / 's'}", folder)

    def remove(self) -> None:
        """Remove the socket's folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _private_folder() -> Path:
    # A socket's mode depends on the umask, but a folder of mkdtemp has mode 0700.
    folder = Path(tempfile.mkdtemp(prefix="mlxr-"))
    if len(os.fsencode(folder / "s")) > _SOCKET_PATH_BYTES:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="mlxr-", dir="/tmp"))
    return folder
