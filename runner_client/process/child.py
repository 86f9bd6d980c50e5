"""One child process, from spawning to reaping."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from typing import IO, TYPE_CHECKING, cast

from runner_client.errors import (
    RunnerError,
    RunnerExitedError,
    RunnerTimeoutError,
    RunnerUnavailableError,
)
from runner_client.process.output import Tail, drain
from runner_common.handshake import ReadyLine
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

logger = logging.getLogger(__name__)

child_logger = logging.getLogger("runner_client.child")
"""Default logger for the output of children."""

_DRAIN_SECONDS = 0.3
"""How long to wait for the output of a dead child; a process that it started may keep the pipes
open indefinitely."""

_EXIT_SECONDS = 0.5
"""How long to wait for the exit of a child whose connection was lost."""


class Child:
    """Child process with a ready line and captured output. Thread-safe.

    Standard input is a pipe that is never written to. When this process dies in any way, the
    pipe closes and the child exits.

    Args:
        command: Program and arguments, run without a shell.
        environment: The complete environment.
        log: Logger for every line of the child's output.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        log: logging.Logger | None = None,
    ) -> None:
        self._command = list(command)
        self._environment = dict(environment)
        self._log = log or child_logger
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._exit_code: int | None = None
        self._is_reaped = False
        self._is_closing = False
        self._killed_because = ""
        # Resident set at the last status, and its time in time.monotonic() seconds.
        self._memory: tuple[int, float] | None = None
        self._ended = 0.0
        self._ready: concurrent.futures.Future[ReadyLine] = concurrent.futures.Future()
        self._exited = threading.Event()
        self._tail = Tail()
        self._on_exit: list[Callable[[], None]] = []

    @property
    def pid(self) -> int | None:
        """The process id; None before the start."""
        return self._process.pid if self._process else None

    def equals(self, other: Child) -> bool:
        """Return whether another child has the same command line and environment."""
        own = self._command, self._environment
        return own == (other._command, other._environment)

    @property
    def has_exited(self) -> bool:
        """True once a started process has exited and is reaped."""
        return self._exited.is_set()

    @property
    def exit_code(self) -> int | None:
        """The exit code; a negative value is the number of a signal.

        None while the process runs, and if other code in this process has reaped it.
        """
        return self._exit_code if self.has_exited else None

    @property
    def stderr_tail(self) -> tuple[str, ...]:
        """The last lines written to standard error."""
        return self._tail.lines()

    def start(self) -> None:
        """Spawn the process.

        Raises:
            RunnerUnavailableError: The child is already closed, or cannot be spawned.
        """
        with self._lock:
            if self._is_closing:
                raise _closed()
            try:
                process = self._process = self._spawn()
            except OSError as error:
                raise RunnerUnavailableError(
                    f"cannot start {self._command[0]}: {error.strerror or error}"
                ) from error
        logger.info("started runner (pid %d): %s", process.pid, " ".join(self._command))
        threading.Thread(
            target=self._watch, args=(process,), name=f"runner-{process.pid}", daemon=True
        ).start()

    def _spawn(self) -> subprocess.Popen[bytes]:
        # A new session keeps the terminal's Ctrl-C from the child: the parent decides. No
        # preexec_fn: gRPC and fork do not mix.
        return subprocess.Popen(
            self._command,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            close_fds=True,
            start_new_session=True,
        )

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        # All three are pipes, as requested in _spawn.
        stdin, stdout, stderr = cast(
            "tuple[IO[bytes], IO[bytes], IO[bytes]]",
            (process.stdin, process.stdout, process.stderr),
        )
        drains = (
            drain(stdout, self._stdout_line, f"runner-{process.pid}-stdout"),
            drain(stderr, self._stderr_line, f"runner-{process.pid}-stderr"),
        )
        self._reap(process)
        last = self._ended + _DRAIN_SECONDS
        for thread in drains:
            thread.join(max(0.0, last - time.monotonic()))
        stdin.close()
        self._note_exit()

    def _reap(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for the process to exit, and record the exit code.

        ``Popen`` is not used for this, because it reports an unknown exit code as 0.
        """
        # The exit code is lost if SIGCHLD is ignored or other code reaped the child first.
        with contextlib.suppress(ChildProcessError):
            self._exit_code = os.waitstatus_to_exitcode(os.waitpid(process.pid, 0)[1])
        self._is_reaped = True
        self._ended = time.monotonic()
        # Keep Popen from waiting too.
        process.returncode = self._exit_code or 0

    def _note_exit(self) -> None:
        logger.info("runner (pid %s) is gone: %s", self.pid, self._in_words())
        with self._lock:
            self._exited.set()
            callbacks, self._on_exit = self._on_exit, []
        self._settle(self.exit_error())
        for callback in callbacks:
            callback()

    def _stdout_line(self, line: str) -> None:
        if self._ready.done():
            self._log.info("[%s] %s", self.pid, line)
            return
        try:
            self._settle(ReadyLine.parse(line))
        except ValueError as error:
            self._settle(
                RunnerUnavailableError(
                    f"the first line printed by the runner (pid {self.pid}) is {error}. Standard "
                    f"output is only for the ready line; is {self._command[0]} a runner?"
                )
            )

    def _stderr_line(self, line: str) -> None:
        self._tail.append(line)
        self._log.info("[%s] %s", self.pid, line)

    def _settle(self, outcome: ReadyLine | RunnerError) -> None:
        """End the wait for the ready line; only the first outcome counts."""
        with self._lock:
            if self._ready.done():
                return
            if isinstance(outcome, RunnerError):
                self._ready.set_exception(outcome)
            else:
                self._ready.set_result(outcome)

    def wait_ready(self, timeout_seconds: float | None) -> ReadyLine:
        """Wait for the ready line.

        Raises:
            RunnerExitedError: The child exited first.
            RunnerTimeoutError: The child printed nothing in time (phase ``"start"``).
            RunnerUnavailableError: The child printed something else, or was closed.
        """
        try:
            return self._ready.result(timeout_seconds)
        except concurrent.futures.TimeoutError:
            raise RunnerTimeoutError(
                f"the runner (pid {self.pid}) printed no ready line within {timeout_seconds:g} s"
                + self._last_lines(),
                phase="start",
                timeout_seconds=timeout_seconds,
            ) from None

    def on_exit(self, callback: Callable[[], None]) -> None:
        """Call ``callback``, which must not raise, once the child has exited, or now if it has."""
        with self._lock:
            if not self._exited.is_set():
                self._on_exit.append(callback)
                return
        callback()

    def explain(self, error: RunnerError) -> RunnerError:
        """Return the exit error instead of ``error`` if the child's death closed the connection.

        May wait half a second for the exit to be noticed.
        """
        is_lost = isinstance(error, RunnerUnavailableError) and not self._is_closing
        return self.exit_error() if is_lost and self._exited.wait(_EXIT_SECONDS) else error

    def wait_exit(self, timeout_seconds: float) -> bool:
        """Wait for the child to exit; return False on timeout."""
        return self._exited.wait(timeout_seconds)

    def gone_error(self) -> RunnerUnavailableError:
        """Return the error for a wait ended by the exit or the close of the child."""
        return _closed() if self._is_closing else self.exit_error()

    def note_memory(self, process_bytes: int) -> None:
        """Record the resident set reported by a status, in bytes."""
        self._memory = process_bytes, time.monotonic()

    def exit_error(self) -> RunnerExitedError:
        """Return the error for an exited child."""
        memory, reason = self._memory, self._in_words()
        return RunnerExitedError(
            f"the runner (pid {self.pid}) is gone: {reason}{self._last_memory()}"
            f"{self._last_lines()}",
            exit_code=self._exit_code,
            exit_reason=reason,
            stderr_tail=self.stderr_tail,
            last_memory_bytes=memory[0] if memory else None,
        )

    def _in_words(self) -> str:
        code = self._exit_code
        if self._process is None:
            return "never started"
        if code is None:
            return _UNKNOWN_EXIT
        if code == -signal.SIGKILL and self._killed_because:
            return f"{_killed(signal.SIGKILL)}, by this client: {self._killed_because}"
        return exit_in_words(code)

    def _last_memory(self) -> str:
        if self._memory is None:
            return ""
        held, seen = self._memory
        before = max(0.0, self._ended - seen)
        return f". It held {format_bytes(held)} at its last status, {before:.1f} s earlier"

    def _last_lines(self) -> str:
        lines = [line for line in self.stderr_tail if line.strip()]
        if not lines:
            return ". It wrote nothing to its standard error"
        return ". The last lines it wrote:\n  " + "\n  ".join(lines[-10:])

    def close(self, grace_seconds: float) -> None:
        """Ask the process to stop, or kill it after the grace time, and wait for the exit.

        May be called at any time, from any thread, and repeatedly. An exception during the wait
        (an interrupt) kills the process at once.
        """
        with self._lock:
            is_first = not self._is_closing
            # The calls on a child that died before the close still raise the exit error.
            self._is_closing = self._is_closing or not self._exited.is_set()
            process = self._process
        self._settle(_closed())
        if process is None:
            return
        try:
            # The server takes a second signal as "stop now", so only one is sent.
            if is_first:
                self._send(signal.SIGINT)
            if not self._exited.wait(grace_seconds):
                self._killed_because = f"it did not stop in {grace_seconds:.1f} s"
                logger.warning("killing runner (pid %d): %s", process.pid, self._killed_because)
        finally:
            self._send(signal.SIGKILL)
            self._exited.wait()

    def kill(self, because: str = "") -> None:
        """Kill the process if running. Returns at once.

        Args:
            because: The reason to name in the error of the exit.
        """
        self._killed_because = self._killed_because or because
        self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        """Send a signal, unless the process is reaped and the id may be reused."""
        if self._process and not self._is_reaped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def abandon(self) -> None:
        """Close standard input, so that the child exits.

        Called when the owner is garbage collected without a close.
        """
        if self._process and self._process.stdin:
            self._process.stdin.close()


_UNKNOWN_EXIT = (
    "its exit code is unknown, because this process ignores SIGCHLD or something else in it waits "
    "for all children"
)

_EXIT_WORDS = {
    70: "its engine failed twice in a row, or could not continue",
    71: "its engine had work but stalled",
}
"""Meanings of the exit codes that the server chooses itself; see docs/reliability.md."""


def exit_in_words(code: int) -> str:
    """Describe how a process ended.

    Args:
        code: As reported by ``subprocess``: a negative value is the number of a signal.
    """
    if code >= 0:
        words = _EXIT_WORDS.get(code)
        return f"exit code {code}" + (f" ({words})" if words else "")
    words = _killed(-code)
    if -code == signal.SIGKILL:
        words += "; the OOM killer does this when memory runs out"
    return words


def _killed(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = "a signal"
    return f"killed by {name} (signal {number})"


def _closed() -> RunnerUnavailableError:
    return RunnerUnavailableError("the runner was closed while it was starting")
