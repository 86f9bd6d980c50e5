"""Fault 4: the death of a parent, in any phase and anywhere in the process tree.

tests/e2e/test_process_real.py kills parents of children that idle, load or generate, with a fork
that keeps the pipe open, and interrupts them. Here: the other phases and process trees.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from support.fake_child import is_gone, wait_until
from support.faulty import BREAK, breaking, hooked

pytestmark = pytest.mark.mlx

PROMISED_SECONDS = 2.0
STARTED_SECONDS = 8.0
POLLED_SECONDS = 1.2
"""Time in which the child checks for its parent twice."""

PARENT = """
import os, sys, threading, time
from runner_client import Options, RunnerProcess
from runner_client.process.child import Child

def report(*words):
    print(*words, flush=True)

def live_on(runner, seconds={polled}):
    # For longer than the child needs to check for its parent.
    since = runner.status().uptime_seconds
    while runner.status().uptime_seconds < since + seconds:
        pass
    assert runner.complete("x", options=Options(num_predict=1)).eval_count == 1

runner = RunnerProcess({model!r}, context_length=32_000)
{body}
time.sleep(600)
"""

SPAWNED = """
def wait_ready(child, seconds):
    report(child.pid)
    time.sleep(600)
Child.wait_ready = wait_ready
runner.load()
"""

PREFILL = """
runner.load()
runner.wait_until_running()
stream = runner.completion([7] * 30_000, options=Options(num_predict=9))
assert next(stream).prompt_progress
report(runner.pid)
for _ in stream: pass
"""

STUCK = """
runner.load()
runner.wait_until_running()
stream = runner.completion("x", request_id={name!r})
while not runner.status().running_count: pass
report(runner.pid)
for _ in stream: pass
"""

IN_A_THREAD = """
thread = threading.Thread(target=runner.load)
thread.start()
thread.join()
runner.wait_until_running()
live_on(runner)
report(runner.pid)
"""

TWO = """
other = RunnerProcess({model!r})
with runner:
    other.load()
    other.wait_until_running()
    first = runner.pid
live_on(other, 0)
runner = RunnerProcess({model!r})
runner.load()
runner.wait_until_running()
os.kill(runner.pid, 9)
while not runner.has_exited:
    time.sleep(0.01)
live_on(other, 0)
report(first, runner.pid, other.pid)
"""

RUNS = """
runner.load()
runner.wait_until_running()
report(runner.pid)
"""

LIVES = """
runner.load()
runner.wait_until_running()
live_on(runner)
report(runner.pid)
"""

FORK_HOLDS_THE_PIPE = RUNS.replace(
    "report(", "fork = os.fork() or (time.sleep(60), os._exit(0))\nreport(fork, "
)

ORPHANED = """
runner.load()
runner.wait_until_running()
begin = os.getppid()
report(runner.pid, os.getpid())
while os.getppid() == begin:
    time.sleep(0.01)
live_on(runner)
report("lives")
"""

REAPER = """
import ctypes, os, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
parent = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""
"""Starts a parent, adopts the orphans of that parent, and exits after the last one."""

MIDDLE = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", sys.argv[1]])
time.sleep(600)
"""


def script(model: str, body: str) -> str:
    body = body.format(model=model, name=BREAK)
    return PARENT.format(model=model, body=body, polled=POLLED_SECONDS)


@contextmanager
def tree(*command: str, path: str = "") -> Iterator[subprocess.Popen[str]]:
    """Start a process tree, and kill the rest of the tree by pid afterwards."""
    environment = {**os.environ, "PYTHONPATH": path} if path else None
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as top:
        started = [psutil.Process(top.pid)]
        try:
            yield top
        finally:
            if top.poll() is None:
                started += started[0].children(recursive=True)
            for process in started:
                if process.is_running():
                    process.kill()


def read_pids(process: subprocess.Popen[str]) -> list[int]:
    """Read the pids in the next line of a script's output."""
    assert process.stdout is not None
    return [int(word) for word in process.stdout.readline().split()]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("body", "seconds"),
    # A child that is not yet ready first checks for its parent when its start is complete.
    [(SPAWNED, STARTED_SECONDS), (PREFILL, PROMISED_SECONDS), (IN_A_THREAD, PROMISED_SECONDS)],
    ids=["spawn", "prefill", "thread"],
)
def test_a_killed_parent_ends_its_child(model: str, body: str, seconds: float) -> None:
    with tree(sys.executable, "-c", script(model, body)) as parent:
        (child,) = read_pids(parent)
        assert not is_gone(child)
        kill(parent.pid)
        parent.wait()
        assert wait_until(lambda: is_gone(child)) < seconds


def test_a_hanging_step_does_not_keep_the_child_alive(model: str, tmp_path: Path) -> None:
    hang = hooked(tmp_path, breaking("import threading; threading.Event().wait()"))
    command = [sys.executable, "-c", script(model, STUCK)]
    with tree(*command, path=hang["PYTHONPATH"]) as parent:
        (child,) = read_pids(parent)
        kill(parent.pid)
        parent.wait()
        assert wait_until(lambda: is_gone(child)) < PROMISED_SECONDS


def test_siblings_outlive_each_other_but_not_their_parent(model: str) -> None:
    with tree(sys.executable, "-c", script(model, TWO)) as parent:
        closed, killed, other = read_pids(parent)
        assert is_gone(closed)
        assert is_gone(killed)
        assert not is_gone(other)
        kill(parent.pid)
        parent.wait()
        assert wait_until(lambda: is_gone(other)) < PROMISED_SECONDS


def test_children_of_another_parent_keep_running(model: str) -> None:
    both = [sys.executable, "-c", script(model, RUNS)]
    with tree(*both) as one, tree(*both) as two:
        (first,), (second,) = read_pids(one), read_pids(two)
        kill(one.pid)
        one.wait()
        assert wait_until(lambda: is_gone(first)) < PROMISED_SECONDS
        assert not is_gone(second)
        kill(two.pid)
        two.wait()
        assert wait_until(lambda: is_gone(second)) < PROMISED_SECONDS


@pytest.mark.skipif(sys.platform != "linux", reason="subreapers are Linux's")
def test_under_a_subreaper_the_child_ends_too(model: str) -> None:
    """Only the parent's pid changes: the new parent is not 1, and a fork keeps stdin open."""
    with tree(sys.executable, "-c", REAPER, script(model, FORK_HOLDS_THE_PIPE)) as reaper:
        fork, child = read_pids(reaper)
        (parent,) = psutil.Process(reaper.pid).children()
        kill(parent.pid)
        assert wait_until(lambda: is_gone(child)) < PROMISED_SECONDS
        assert psutil.Process(fork).ppid() == reaper.pid
        kill(fork)


@pytest.mark.skipif(sys.platform != "linux", reason="subreapers are Linux's")
def test_an_orphaned_parent_keeps_its_child(model: str) -> None:
    """Under ``nohup`` or a service manager, the parent's own parent may end at any time."""
    with tree(sys.executable, "-c", MIDDLE, script(model, ORPHANED)) as middle:
        child, parent = read_pids(middle)
        try:
            kill(middle.pid)
            middle.wait()
            assert middle.stdout is not None
            assert middle.stdout.readline() == "lives\n"
            assert not is_gone(child)
        finally:
            kill(parent)
        assert wait_until(lambda: is_gone(child)) < PROMISED_SECONDS


def _can_unshare() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    command = [unshare, "--pid", "--fork", "true"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_unshare(), reason="unshare --pid --fork is not allowed here")
def test_a_parent_that_is_process_1_keeps_its_child(model: str) -> None:
    """In a container, ``getppid() == 1`` also holds for a living parent."""
    with tree("unshare", "--pid", "--fork", sys.executable, "-c", script(model, LIVES)) as top:
        # The child has run long enough to check for its parent.
        assert len(read_pids(top)) == 1
        (parent,) = psutil.Process(top.pid).children()
        (child,) = parent.children()
        assert "runner_server" in child.cmdline()
        kill(parent.pid)
        assert wait_until(lambda: is_gone(child.pid)) < PROMISED_SECONDS
