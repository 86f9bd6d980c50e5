"""``mlx-runner pool`` and ``mlx-runner ps``: real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from runner_client import Options, RunnerClient
from runner_client.testing import fake_runner
from runner_common.handshake import ReadyLine
from support.command_line import invoke
from support.fake_child import wait_until
from support.models import build_model

pytestmark = [pytest.mark.mlx, pytest.mark.slow]

PROMISED_SECONDS = 2.0
"""Longest time that runners outlive their pool."""

SLACK_SECONDS = 1.0
"""For the scheduling of a machine with other tests."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=16_384)


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    file = tmp_path / "models.toml"
    file.write_text(
        f'budget = "8GiB"\n[models."{model}"]\ncontext_length = 16000\nparallel = 2\n'
        "prefix_cache = 0\npinned = true\n"
    )
    return file


@dataclass
class Pool:
    """A pool in a process of its own."""

    process: subprocess.Popen[bytes]
    address: str

    def state(self, *options: str) -> dict[str, Any]:
        """Return what ``mlx-runner ps --json`` prints."""
        done = invoke("ps", self.address, "--json", *options)
        assert done.exit_code == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def models(self, *options: str) -> list[dict[str, object]]:
        """Return what ``mlx-runner ps --json`` prints about the models."""
        found: list[dict[str, object]] = self.state(*options)["models"]
        return found

    def spare_pid(self, *others: int) -> int:
        """Wait until a new spare process is ready; return the process id."""
        wait_until(lambda: self.state()["spare_count"] == 1, 60)
        children = {child.pid for child in psutil.Process(self.process.pid).children()}
        (pid,) = children - set(others)
        return pid

    def runner_pid(self) -> int:
        """Wait until the only model is loaded; return its runner's process id."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            (model,) = self.models()
            if model["state"] == "ready":
                assert isinstance(model["pid"], int)
                return model["pid"]
            time.sleep(0.05)
        raise AssertionError(model)


@contextmanager
def running(*arguments: object, log: Path) -> Iterator[Pool]:
    command = [sys.executable, "-m", "runner_common.console", "pool", *map(str, arguments)]
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
        )
    assert process.stdin
    assert process.stdout
    try:
        line = process.stdout.readline().decode()
        assert line, log.read_text()
        yield Pool(process, ReadyLine.parse(line).target)
    finally:
        # A kill would leave runners, and their reservations, to the next test.
        process.send_signal(signal.SIGINT)
        process.wait(20)
        process.stdin.close()
        process.stdout.close()


@pytest.fixture
def pool(config: Path, tmp_path: Path) -> Iterator[Pool]:
    with running("--config", config, log=tmp_path / "log") as found:
        yield found


def assert_gone(pid: int, since: float) -> None:
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - since < PROMISED_SECONDS + SLACK_SECONDS
        time.sleep(0.02)


def long_completion(client: RunnerClient, model: Path) -> Iterator[object]:
    options = Options(num_predict=15_000, logit_bias={0: -100})
    return client.completion("def", options=options, model=str(model))


def test_pinned_models_are_loaded_and_listed(pool: Pool, model: Path) -> None:
    pid = pool.runner_pid()
    (listed,) = pool.models()
    assert (listed["name"], listed["path"], listed["pinned"]) == (str(model), str(model), True)
    assert listed["idle_seconds"] is not None
    table = invoke("ps", pool.address)
    assert table.exit_code == 0
    head, row, total = table.stdout.splitlines()
    assert head.split("  ")[0] == "MODEL"
    assert row.startswith(f"{model}  ready  ")
    assert " yes" in row
    assert total.endswith("of 8.0 GiB")
    with RunnerClient(pool.address) as client:
        assert client.complete("def", options=Options(num_predict=2)).eval_count
        assert client.status(model=str(model)).pid == pid


def test_watching_prints_each_change(pool: Pool, model: Path) -> None:
    pool.runner_pid()
    command = [sys.executable, "-m", "runner_common.console", "ps", pool.address]
    with subprocess.Popen([*command, "--watch", "--json"], stdout=subprocess.PIPE) as watch:
        assert watch.stdout
        try:
            first = json.loads(watch.stdout.readline())
            assert first["models"][0]["lease_count"] == 0
            with RunnerClient(pool.address) as client:
                stream = long_completion(client, model)
                next(stream)
                assert json.loads(watch.stdout.readline())["models"][0]["lease_count"] == 1
        finally:
            watch.send_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_runners_and_exits_with_0(
    pool: Pool, model: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pid = pool.runner_pid()
    with RunnerClient(pool.address) as client:
        stream = long_completion(client, model)
        next(stream)
        pool.process.send_signal(number)
        assert pool.process.wait(20) == 0
    assert not psutil.pid_exists(pid)
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_signal_during_a_load_stops_it(pool: Pool, tmp_path: Path) -> None:
    while not psutil.Process(pool.process.pid).children():
        time.sleep(0.01)
    pool.process.send_signal(signal.SIGINT)
    assert pool.process.wait(20) == 0
    # A runner that is interrupted while it starts may say where.
    own = [line for line in (tmp_path / "log").read_text().splitlines() if ".child: " not in line]
    assert "Traceback" not in "\n".join(own)


def test_a_second_signal_ends_it_now(pool: Pool) -> None:
    pid = pool.runner_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        pool.process.send_signal(signal.SIGINT)
        with RunnerClient(pool.address) as client:
            while client.is_serving():
                time.sleep(0.01)
        pool.process.send_signal(signal.SIGINT)
        assert pool.process.wait(5) == 128 + signal.SIGINT
    finally:
        os.kill(pid, signal.SIGCONT)
    assert_gone(pid, time.monotonic())


def test_runners_do_not_outlive_a_killed_pool(pool: Pool, model: Path) -> None:
    pid = pool.runner_pid()
    with RunnerClient(pool.address) as client:
        stream = long_completion(client, model)
        next(stream)
        killed = time.monotonic()
        pool.process.kill()
        assert_gone(pid, killed)


def test_a_spare_process_is_listed_taken_and_ends_with_a_killed_pool(
    config: Path, model: Path, tmp_path: Path
) -> None:
    config.write_text("spare_processes = 1\n" + config.read_text().replace("pinned = true\n", ""))
    with running("--config", config, log=tmp_path / "log") as pool:
        pid = pool.spare_pid()
        with RunnerClient(pool.address) as client:
            assert client.tokenize("def", model=str(model))
        assert pool.runner_pid() == pid
        spare = pool.spare_pid(pid)
        table = invoke("ps", pool.address)
        assert table.stdout.rstrip().endswith("102.0 MiB of it in spare processes (1 ready)")
        killed = time.monotonic()
        pool.process.kill()
        assert_gone(pid, killed)
        assert_gone(spare, killed)


def test_a_pool_ends_with_its_parent(config: Path, tmp_path: Path) -> None:
    with running("--config", config, "--exit-with-parent", log=tmp_path / "log") as pool:
        pid = pool.runner_pid()
        closed = time.monotonic()
        assert pool.process.stdin
        pool.process.stdin.close()
        pool.process.wait(PROMISED_SECONDS + SLACK_SECONDS)
        assert_gone(pid, closed + PROMISED_SECONDS)


def test_a_unix_socket_with_a_token(model: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("s" * 32)
    arguments = ("--listen", f"unix:{tmp_path}/pool.sock", "--token-file", token)
    with running(*arguments, "--budget", "8GiB", log=tmp_path / "log") as pool:
        refused = invoke("ps", pool.address)
        assert (refused.exit_code, "--token-file" in refused.stderr) == (1, True)
        assert pool.models("--token-file", str(token)) == []
        with RunnerClient(pool.address, token="s" * 32) as client:
            assert client.tokenize("def", model=str(model))
        (listed,) = pool.models("--token-file", str(token))
        assert listed["state"] == "ready"
        pool.process.send_signal(signal.SIGTERM)
        assert pool.process.wait(20) == 0
    assert not (tmp_path / "pool.sock").exists()


def test_wrong_usage_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text("[models.x]\nparalel = 2\n")
    done = invoke("pool", "--config", str(file))
    assert done.exit_code == 2
    assert "models.x.paralel" in done.stderr
    token = tmp_path / "token"
    token.write_text("s" * 32)
    done = invoke("pool", "--use-token-file", str(token))
    assert done.exit_code == 2
    assert "a token for use needs a token with all rights" in done.stderr
    done = invoke("pool", "--tls-cert", str(token))
    assert (done.exit_code, "--tls-cert needs --tls-key" in done.stderr) == (2, True)


def test_an_open_address_is_refused_without_a_token() -> None:
    command = [sys.executable, "-m", "runner_common.console", "pool", "--listen", "0.0.0.0:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "open to other machines" in done.stderr


def test_ps_says_that_a_runner_is_not_a_pool() -> None:
    with fake_runner() as runner:
        done = invoke("ps", runner.address)
    assert done.exit_code == 1
    assert "does not offer this call" in done.stderr
