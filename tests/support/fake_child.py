"""Fake runners in child processes, started by process tests instead of the server."""

from __future__ import annotations

import json
import os
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import runner_client

_SCRIPT = """
import gc, math, os, signal, sys, threading, types
gc.disable()
# Only the fake, without the library around it, whose import takes as long again.
package = types.ModuleType("runner_client")
package.__path__ = [{package!r}]
sys.modules["runner_client"] = package
from runner_common.handshake import ReadyLine
from runner_client.testing import Failure, fake_runner
gc.enable()

stop = threading.Event()
signal.signal(signal.SIGINT, lambda *_: stop.set())

def watch_parent():
    while os.read(0, 1):
        pass
    os._exit(7)

with fake_runner() as runner:
    runner.model = None
{behaviour}
    print(ReadyLine("tcp", runner.address).format(), flush=True)
    threading.Thread(target=watch_parent, daemon=True).start()
    while not stop.wait(0.05):
        pass
    for request in runner.requests:
        print(repr(str(request)), file=sys.stderr)
"""


def use_fake_child(monkeypatch: pytest.MonkeyPatch, behaviour: str = "pass") -> None:
    """Make runner processes start a fake runner.

    Args:
        monkeypatch: Restores the command of the server after the test.
        behaviour: Python statements that configure ``runner``, a ``FakeRunner``.
    """
    lines = "\n".join(f"    {line}" for line in behaviour.splitlines())
    package = str(Path(runner_client.__file__).parent)
    use_script(monkeypatch, _SCRIPT.format(package=package, behaviour=lines))


def use_script(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make runner processes start ``script``.

    Estimates come from the file headers, since the model of ``write_model`` cannot be built.
    """
    monkeypatch.setattr("runner_client.memory.estimation.can_ask", lambda: False)
    command = [sys.executable, "-c", script]
    monkeypatch.setattr(
        "runner_client.process.launch.server_command", lambda listen: [*command, listen]
    )


def write_model(path: Path, weight_bytes: int = 4096, dtype: str = "F32") -> Path:
    """Write the files which an estimate reads; MLX cannot load the model."""
    path.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    (path / "config.json").write_text(json.dumps(config))
    count = weight_bytes // {"F32": 4, "F16": 2}[dtype]
    tensor = {"dtype": dtype, "shape": [count], "data_offsets": [0, weight_bytes]}
    header = json.dumps({"model.embed_tokens.weight": tensor}).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + weight_bytes)
    return path


def is_gone(pid: int) -> bool:
    """Return whether a process has ended; a zombie has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(is_true: Callable[[], bool], seconds: float = 10.0) -> float:
    """Wait by polling until ``is_true`` returns True; return the seconds waited."""
    begin = time.monotonic()
    while not is_true():
        assert time.monotonic() - begin < seconds, "the condition was not met in time"
        time.sleep(0.01)
    return time.monotonic() - begin


def open_files() -> int:
    """Return the number of file descriptors held by this process."""
    return len(os.listdir("/dev/fd"))  # noqa: PTH208 - Path.iterdir keeps one more open
