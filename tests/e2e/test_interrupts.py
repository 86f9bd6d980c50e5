"""SIGINT at any moment of a command or of a server's start.

``INTERRUPTS`` is the number of moments for each command, 8 by default; after a change of the start,
try 100. Commands have different moments, because the first half second is common to them.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import sysconfig
import termios
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from runner_client.cli.demo import demo_model
from support.sweeps import sampled

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = [pytest.mark.mlx, pytest.mark.timeout(150)]

COMMAND = str(Path(sysconfig.get_path("scripts")) / "mlx-runner")
MODEL = str(demo_model())
TRIES = int(os.environ.get("INTERRUPTS", "8"))
LATEST_SECONDS = 0.6
GONE_SECONDS = 10.0
"""Limit on the time until a process is gone; far above the usual."""

MARK = "MLX_RUNNER_TESTED_BY"
"""Environment variable that tells processes of one try from others."""


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block SIGINT, also in children, until the program takes signals itself.

    Nothing in a program can handle a signal before the interpreter has started.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _interrupted(arguments: Sequence[str], delay_seconds: float) -> tuple[int, str]:
    """Send SIGINT to a program and its process group after a delay; return code and stderr."""
    mark = f"{os.getpid()}-{delay_seconds}"
    with _interrupts_held():
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, MARK: mark},
        )
    with process:
        # The delay is the variable of the test.
        time.sleep(delay_seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    _, left = psutil.wait_procs(list(_marked(mark)), GONE_SECONDS)
    assert not left
    return process.returncode, err


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                yield process
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            continue


def _delays(command: str) -> list[float]:
    """Return one random delay in each of equal parts of the time."""
    part = LATEST_SECONDS / TRIES
    numbers = random.Random(command)  # noqa: S311 - reproducible
    return [part * (at + numbers.random()) for at in range(TRIES)]


COMMANDS = [
    (("--help",), 0),
    (("status", "127.0.0.1:1"), 1),
    (("estimate", MODEL), 0),
    (("run", MODEL, "import os", "--num-predict", "8"), 0),
    (("serve",), 0),
]


@pytest.mark.parametrize(
    ("arguments", "finished"),
    sampled(COMMANDS, [COMMANDS[0], *COMMANDS[3:]]),
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_command_ends_with_130_at_any_moment(arguments: tuple[str, ...], finished: int) -> None:
    codes = set()
    for delay_seconds in _delays(arguments[0]):
        code, err = _interrupted((COMMAND, *arguments), delay_seconds)
        assert code in {130, finished}, (delay_seconds, code, err)
        assert "Traceback" not in err, (delay_seconds, err)
        assert "Aborted" not in err
        codes.add(code)
    # A signal that is never delivered would pass everything else.
    assert 130 in codes


def test_a_server_ends_with_0_at_any_moment_of_its_start() -> None:
    for delay_seconds in _delays("runner_server"):
        server = (sys.executable, "-m", "runner_server", "--listen", "127.0.0.1:0")
        code, err = _interrupted(server, delay_seconds)
        assert code == 0, (delay_seconds, err)
        assert "Traceback" not in err, (delay_seconds, err)


@pytest.mark.parametrize("command", ["run", "tokenize"])
def test_an_interrupt_while_standard_input_is_read_ends_with_130(command: str) -> None:
    arguments = [COMMAND, command, *(["--model"] if command == "tokenize" else []), MODEL, "-"]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin
        process.stdin.write(b"x")
        _wait_until_taken(process.stdin.fileno())
        process.send_signal(signal.SIGINT)
        # Standard input stays open: its end would end the reading.
        assert process.wait(GONE_SECONDS) == 130
        _, err = process.communicate(timeout=GONE_SECONDS)
    assert err == b"\ninterrupted\n"


def _wait_until_taken(pipe: int) -> None:
    end = time.monotonic() + GONE_SECONDS
    while struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, b"\0" * 4)) != (0,):
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_ignored_interrupt_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen([COMMAND, "status", "127.0.0.1:1"], stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"cannot reach the runner" in err
