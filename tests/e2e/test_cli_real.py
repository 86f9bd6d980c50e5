"""``mlx-runner`` in real processes: the embedded model, pipes and a terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil
import pytest

from runner_client.cli.demo import PROMPT, demo_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

pytestmark = [pytest.mark.mlx, pytest.mark.timeout(120)]

COMMAND = Path(sysconfig.get_path("scripts")) / "mlx-runner"
MODEL = str(demo_model())
GONE_SECONDS = 10.0
"""Limit on the time until a process is gone; far above the usual."""

FULL = {"MLX_RUNNER_GPU_OVERHEAD": str(2**50)}
"""Environment in which every machine has too little memory."""

LONG = (
    *("run", MODEL, "import os\nimport sys\n", "--context-length", "1024"),
    *("--temperature", "1.5", "--top-k", "0", "--top-p", "1", "--seed", "2"),
)
"""Command that generates text for some seconds, which repeats too little to be drafted."""

# Runs a command in a pseudo-terminal, to which the test sends keys.
IN_A_TERMINAL = (
    sys.executable,
    "-c",
    "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))",
)


def _environment(more: dict[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    return {**kept, "TERM": "xterm", **(more or {})}


def _run(
    *arguments: str, given: str | None = None, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments],
        check=False,
        input=given,
        capture_output=True,
        text=True,
        timeout=100,
        env=_environment(environment),
    )


@dataclass
class Running:
    """Command in progress, with its pipes."""

    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]

    def finish(self) -> tuple[int, str, str]:
        """Wait for the exit; return the exit code and the rest of stdout and stderr."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out.decode(), err.decode()

    def runner(self) -> psutil.Process:
        """Return the runner process started by the command."""
        found = [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if "runner_server" in process.cmdline()
        ]
        assert len(found) == 1, found
        return found[0]


@contextmanager
def _running(
    arguments: Sequence[str | Path], environment: dict[str, str] | None = None
) -> Iterator[Running]:
    process = subprocess.Popen(
        arguments,
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=_environment(environment),
    )
    assert process.stdin
    assert process.stdout
    assert process.stderr
    with process:
        try:
            yield Running(process, process.stdin, process.stdout, process.stderr)
        finally:
            process.kill()


def _read_until(stream: IO[bytes], wanted: bytes) -> bytes:
    """Read until ``wanted`` appears; fail if the stream ends first."""
    seen = b""
    while wanted not in seen:
        data = os.read(stream.fileno(), 4096)
        assert data, f"{wanted!r} never came; there was {seen!r}"
        seen += data
    return seen


def _assert_gone(runner: psutil.Process) -> None:
    runner.wait(GONE_SECONDS)
    assert not runner.is_running()


def test_demo_completes_and_leaves_no_process() -> None:
    result = _run("demo")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[0] == "loading the demo model"
    assert "Traceback" not in result.stderr
    assert "\x1b" not in result.stdout
    begin = result.stdout.index(PROMPT) + len(PROMPT)
    text, _, facts = result.stdout[begin:].rpartition("\n\nprompt ")
    assert len(text.split()) > 10
    assert text.isprintable() or "\n" in text
    assert re.search(r"^generated +[1-9]\d* tokens, [\d.,]+ tokens/s", facts, re.MULTILINE)
    assert re.search(r"^memory +active [\d.]+ MiB", facts, re.MULTILINE)
    stopped = re.search(r"^stopped +process (\d+) has exited", facts, re.MULTILINE)
    assert stopped
    assert not psutil.pid_exists(int(stopped[1]))


def test_run_is_repeatable_with_a_seed() -> None:
    arguments = ("run", MODEL, "def ", "--seed", "7", "--num-predict", "12")
    first, second = _run(*arguments), _run(*arguments, "--json")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    record = json.loads(second.stdout)
    assert first.stdout == record["content"] + "\n"
    assert len(record["token_ids"]) == record["eval_count"] <= 12
    assert record["model"]["path"] == MODEL
    assert re.search(r"^prompt +\d+ tokens?, ", first.stderr, re.MULTILINE)


def test_run_reads_the_prompt_from_standard_input_and_stops_at_a_string() -> None:
    result = _run(
        "run", MODEL, "-", "--temperature", "0", "--stop", "e", "--json", given="def read(self):\n"
    )
    record = json.loads(result.stdout)
    assert record["done_reason"] == "stop"
    assert record["stop_match"] == "e"
    assert "e" not in record["content"]


def test_text_is_streamed_and_a_dead_runner_is_reported() -> None:
    with _running([COMMAND, *LONG]) as command:
        assert os.read(command.stdout.fileno(), 1)
        runner = command.runner()
        runner.kill()
        code, _, err = command.finish()
    assert code == 1
    assert f"error: the runner (pid {runner.pid}) is gone: killed by SIGKILL" in err
    assert "Traceback" not in err


def test_ctrl_c_in_a_terminal_stops_the_runner() -> None:
    with _running([*IN_A_TERMINAL, COMMAND, *LONG]) as command:
        # The bar shows the cursor again and ends its line before the text begins.
        assert b"100%" in _read_until(command.stdout, b"\x1b[?25h\r\n")
        assert os.read(command.stdout.fileno(), 1)
        runner = command.runner()
        command.stdin.write(b"\x03")
        code, out, err = command.finish()
    assert code == 130, out + err
    assert out.endswith("\r\ninterrupted\r\n")
    assert "Traceback" not in out + err
    _assert_gone(runner)


def test_ctrl_c_during_the_load_stops_the_runner() -> None:
    with _running([COMMAND, *LONG]) as command:
        _read_until(command.stderr, b"loading")
        runner = command.runner()
        command.process.send_signal(signal.SIGINT)
        code, out, err = command.finish()
    assert code == 130, err
    assert out == ""
    assert "Traceback" not in err
    _assert_gone(runner)


def test_a_killed_command_leaves_no_runner() -> None:
    with _running([COMMAND, *LONG]) as command:
        assert os.read(command.stdout.fileno(), 1)
        runner = command.runner()
        command.process.kill()
        _assert_gone(runner)


def test_a_closed_pipe_ends_the_command_quietly() -> None:
    with _running([COMMAND, *LONG]) as command:
        assert os.read(command.stdout.fileno(), 1)
        runner = command.runner()
        command.stdout.close()
        err = command.stderr.read().decode()
        assert command.process.wait(60) == 1
    assert all(line.startswith("loading") for line in err.splitlines()), err
    _assert_gone(runner)


def test_demo_in_a_terminal_has_a_bar_and_obeys_no_color() -> None:
    with _running([*IN_A_TERMINAL, COMMAND, "demo"], {"NO_COLOR": "1"}) as command:
        code, out, _ = command.finish()
    assert code == 0, out
    assert "loading the demo model  [####" in out
    assert "\x1b[1m" not in out
    with _running([*IN_A_TERMINAL, COMMAND, "demo"]) as command:
        code, out, _ = command.finish()
    assert "\x1b[1m" in out


@pytest.mark.parametrize(
    ("break_model", "says"),
    [
        (shutil.rmtree, "no model at"),
        (lambda model: (model / "config.json").unlink(), "no config.json in"),
        (lambda model: (model / "config.json").write_text("{"), "config.json"),
        (lambda model: (model / "model.safetensors").write_bytes(b"\0" * 9), "model.safetensors"),
        (lambda model: (model / "tokenizer.json").unlink(), "tokenizer"),
    ],
    ids=["gone", "no config", "bad config", "bad weights", "no tokenizer"],
)
def test_a_broken_model_is_reported(tmp_path: Path, break_model: object, says: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    assert callable(break_model)
    break_model(model)
    result = _run("run", str(model), "hi", "--num-predict", "3")
    assert result.returncode == 1
    assert result.stdout == ""
    assert says in result.stderr.partition("error: ")[2]
    assert "Traceback" not in result.stderr


def test_too_little_memory_is_reported() -> None:
    result = _run("run", MODEL, "hi", environment=FULL)
    assert result.returncode == 3
    assert "Lower MLX_RUNNER_GPU_OVERHEAD (1024.0 TiB), stop" in result.stderr
    assert "override the gate with --memory-override" in result.stderr
    assert re.fullmatch(r"error: .* requires [\d.]+ MiB, .*\n", result.stderr)
    estimate = _run("estimate", MODEL, environment=FULL)
    assert estimate.returncode == 3
    assert re.search(r"^fits +no, [\d.]+ MiB short", estimate.stdout, re.MULTILINE)
    assert json.loads(_run("estimate", MODEL, "--json", environment=FULL).stdout)["fits"] is False


def test_the_gate_can_be_overridden() -> None:
    arguments = ("run", MODEL, "hi", "--num-predict", "2", "--memory-override")
    assert _run(*arguments, environment=FULL).returncode == 0


def test_estimate_shows_parts_that_add_up() -> None:
    arguments = ("estimate", MODEL, "--context-length", "512", "--parallel", "2")
    report = json.loads(_run(*arguments, "--json").stdout)
    need = report["estimate"]
    parts = ("weight", "kv", "prefix_cache", "working", "process", "load_transient")
    assert report["fits"] is True
    assert need["total_bytes"] == sum(need[f"{part}_bytes"] for part in parts)
    assert need["required_bytes"] == need["total_bytes"] - need["prefix_cache_bytes"]
    result = _run(*arguments)
    assert result.returncode == 0
    assert {"weights", "KV", "prefix", "working", "process", "needed", "free", "fits"} <= {
        line.split()[0] for line in result.stdout.splitlines()
    }


def test_tokenize_and_detokenize_are_inverses() -> None:
    text = "def naïve(self):\n    return '😀'"
    record = json.loads(_run("tokenize", "--model", MODEL, "--json", text).stdout)
    ids = " ".join(map(str, record["token_ids"]))
    assert _run("tokenize", "--model", MODEL, "--detokenize", "-", given=ids).stdout == text + "\n"


def test_serve_runs_the_server(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 's'}"
    arguments = ("serve", "--model", MODEL, "--listen", address, "--parallel", "2")
    with _running([COMMAND, *arguments, "--context-length", "256"]) as server:
        assert server.stdout.readline() == f"1|1|unix|{tmp_path / 's'}|grpc\n".encode()
        _read_until(server.stderr, b"loaded ")
        status = json.loads(_run("status", address, "--json").stdout)
        assert (status["state"], status["pid"]) == ("active", server.process.pid)
        assert (status["context_length"], status["parallel"]) == (256, 2)
        ids = _run("tokenize", "--address", address, "import os").stdout
        assert _run("tokenize", "--address", address, "--detokenize", ids).stdout == "import os\n"
        assert _run("run", "--address", address, "import os", "--num-predict", "2").stdout
        assert _run("load", address, MODEL, "--context-length", "128").returncode == 0
        assert json.loads(_run("status", address, "--json").stdout)["context_length"] == 128
        assert "MiB freed" in _run("unload", address).stdout
        server.process.send_signal(signal.SIGINT)
        code, out, _ = server.finish()
    assert (code, out) == (0, "")
    assert _run("status", address).returncode == 1


def test_doctor_reports_its_findings_as_json() -> None:
    result = _run("doctor", "--json")
    report = json.loads(result.stdout)
    assert result.returncode == (0 if report["ok"] else 1)
    assert {"Python", "MLX", "free memory"} <= {finding["name"] for finding in report["findings"]}
