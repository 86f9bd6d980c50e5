"""Fault 7: what lies on the disk is broken, or changes while it is read.

The same and more cases against the adapter alone: tests/adapter/test_broken_models.py. Here
a real child refuses each with a typed error that names the file, and is usable afterwards.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from runner_client import MemoryGate, Options, RunnerClient, RunnerProcess, errors
from runner_client.memory import estimation
from support.fake_child import wait_until
from support.faulty import end_of, hooked, in_threads, pid_of
from support.mlx_tasks import CountedLoads

pytestmark = pytest.mark.mlx

Build = Callable[..., Path]
Break = Callable[[Path], object]
SHORT = Options(num_predict=3, temperature=0)
PROMISED_SECONDS = 5.0
SECOND = "model-00002-of-00003.safetensors"


def _config(**changes: object) -> Break:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return change


def _remove(name: str) -> Break:
    return lambda path: (path / name).unlink()


def _cut(path: Path) -> None:
    file = path / SECOND
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - 1000])


Entries = dict[str, dict[str, Any]]


def _header(change: Callable[[Entries], object]) -> Break:
    """Rewrites the header of a shard; the data stays as it is."""

    def apply(path: Path) -> None:
        file = path / SECOND
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change({name: entry for name, entry in header.items() if name != "__metadata__"})
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def _longer(entries: Entries) -> None:
    """The last tensor ends behind the file, and its shape agrees."""
    entry = max(entries.values(), key=lambda each: each["data_offsets"][0])
    first, last = entry["data_offsets"]
    entry["data_offsets"] = [first, last + 10**9]
    entry["shape"] = [(last + 10**9 - first) // 4]


def _behind(entries: Entries) -> None:
    """Every tensor lies where the file has ended; its length is right."""
    for entry in entries.values():
        first, last = entry["data_offsets"]
        entry["data_offsets"] = [first + 10**12, last + 10**12]


def _shape(entries: Entries) -> None:
    """A shape that its length does not hold."""
    for entry in entries.values():
        entry["shape"] = [2**40, 2**20]


def _lie(length: int) -> Break:
    def apply(path: Path) -> None:
        file = path / SECOND
        file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])

    return apply


def _folder(name: str) -> Break:
    """A directory in place of a file: not even root can read it as one."""

    def apply(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return apply


DAMAGE: dict[str, tuple[Break, str]] = {
    "a shard is missing": (_remove(SECOND), SECOND),
    "a shard is cut off": (_cut, SECOND),
    "a length behind the end": (_header(_longer), SECOND),
    "tensors behind the end": (_header(_behind), SECOND),
    "a shape of another length": (_header(_shape), SECOND),
    "a header longer than the file": (_lie(2**40), SECOND),
    "a header of 2**63 bytes": (_lie(2**63), SECOND),
    "a header of nothing": (_lie(0), SECOND),
    "great width": (_config(hidden_size=2 * 10**9), "config.json"),
    "absurd width": (_config(hidden_size=10**12), "config.json"),
    "absurd vocabulary": (_config(vocab_size=10**12), "config.json"),
    "absurd depth": (_config(num_hidden_layers=10**9), "config.json"),
    "absurd heads": (_config(num_attention_heads=10**9, num_key_value_heads=10**9), "config.json"),
    "negative depth": (_config(num_hidden_layers=-1), "config.json"),
    "absurd depth of a part": (
        _config(num_hidden_layers=None, text_config={"num_hidden_layers": 10**9}),
        "config.json",
    ),
    "numbers of a million digits": (
        lambda path: (path / "config.json").write_text('{"model_type": ' + "9" * 10**6 + "}"),
        "config.json",
    ),
    "a config nested for ever": (
        lambda path: (path / "config.json").write_text("[" * 10**6),
        "config.json",
    ),
    "absurd context": (_config(max_position_embeddings=10**30), "config.json"),
    "no tokenizer": (_remove("tokenizer.json"), "tokenizer"),
    "config.json cannot be read": (_folder("config.json"), "config.json"),
    "a shard cannot be read": (_folder(SECOND), SECOND),
    "tokenizer.json cannot be read": (_folder("tokenizer.json"), "tokenizer"),
}


@pytest.fixture(scope="module")
def sound(model_dir: Build) -> Path:
    return model_dir(shards=3)


@pytest.fixture(scope="module")
def loads(tmp_path_factory: pytest.TempPathFactory) -> CountedLoads:
    return CountedLoads(tmp_path_factory.mktemp("loads"))


@pytest.fixture(scope="module")
def runner(
    sound: Path, loads: CountedLoads, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunnerProcess]:
    env = hooked(tmp_path_factory.mktemp("hook"), loads.code)
    with RunnerProcess(str(sound), env=env) as process:
        yield process


@pytest.fixture
def copy(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


@pytest.fixture
def client(runner: RunnerProcess) -> RunnerClient:
    """Its own client: the process itself loads one model only."""
    return runner._client


@pytest.mark.parametrize("case", DAMAGE)
def test_the_server_names_the_file_and_goes_on(
    runner: RunnerProcess,
    client: RunnerClient,
    loads: CountedLoads,
    sound: Path,
    copy: Path,
    case: str,
) -> None:
    damage, named = DAMAGE[case]
    damage(copy)
    pid = pid_of(runner)
    held = psutil.Process(pid).memory_info().rss
    began = time.monotonic()
    error = end_of(lambda: client.load(str(copy)))
    assert time.monotonic() - began < PROMISED_SECONDS
    assert isinstance(error, errors.ModelUnsupportedError | errors.InsufficientMemoryError), error
    assert named in str(error), str(error)
    assert psutil.Process(pid).memory_info().rss < held + 64 * 2**20
    client.load(str(sound))
    assert client.complete("def", options=SHORT).eval_count == 3
    loads.assert_no_tasks_left(2)


@pytest.mark.parametrize("case", DAMAGE)
def test_the_gate_names_the_file_or_lets_the_server_judge(copy: Path, case: str) -> None:
    """It reads headers only; whatever it finds is of the tree, and quickly."""
    damage, named = DAMAGE[case]
    damage(copy)
    began = time.monotonic()
    error = end_of(lambda: MemoryGate().check(estimation.estimate(str(copy)), override=False))
    assert time.monotonic() - began < PROMISED_SECONDS
    if isinstance(error, errors.ModelUnsupportedError):
        assert named in str(error), str(error)
    else:
        assert error is None or isinstance(error, errors.InsufficientMemoryError)


WAIT_BEFORE_READING = """
import os, time
from runner_server.engine.request_registry import Ledger
note_progress = Ledger.note_progress

def wait(self, progress):
    note_progress(self, progress)
    # All sizes are known then, and no weight is read.
    while progress == 5 and not os.path.exists({go!r}):
        time.sleep(0.01)

Ledger.note_progress = wait
"""


def _cut_off(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(4096)


def _replace(file: Path) -> None:
    """As a download that is begun again does it."""
    file.unlink()
    file.write_bytes(b"")


@pytest.mark.parametrize("change", [_cut_off, _replace])
def test_a_model_that_changes_while_it_is_read(
    sound: Path, copy: Path, tmp_path: Path, change: Break
) -> None:
    """Its sizes are known and its data is not yet read when a shard changes."""
    (tmp_path / "hook").mkdir()
    go, loads = tmp_path / "go", CountedLoads(tmp_path)
    env = hooked(tmp_path / "hook", WAIT_BEFORE_READING.format(go=str(go)) + loads.code)
    go.touch()
    with RunnerProcess(str(copy), env=env) as runner, in_threads(1) as pool:
        client = runner._client
        go.unlink()
        load = pool.submit(end_of, lambda: client.load(str(copy)))
        wait_until(lambda: client.status().progress == 5)
        change(copy / SECOND)
        go.touch()
        error = load.result(20)
        # A file that is open may be gone from its folder and be read all the same.
        if change is _cut_off or error:
            assert isinstance(error, errors.ModelUnsupportedError), error
            assert SECOND in str(error)
        client.load(str(sound))
        assert client.complete("def", options=SHORT).eval_count == 3
        loads.assert_no_tasks_left(3)


FAILING_READS = """
import errno, os
preadv = os.preadv
reads = 0

def failing(file, buffers, position, *flags):
    global reads
    reads += 1
    if reads > 5 and os.path.exists({broken!r}):
        raise OSError(errno.EIO, "Input/output error")
    return preadv(file, buffers, position, *flags)

os.preadv = failing
"""


def test_a_disk_that_fails_while_it_is_read(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    broken, loads = tmp_path / "broken", CountedLoads(tmp_path)
    env = hooked(tmp_path / "hook", FAILING_READS.format(broken=str(broken)) + loads.code)
    with RunnerProcess(str(sound), env=env) as runner:
        client = runner._client
        broken.touch()
        for _ in range(20):
            error = end_of(lambda: client.load(str(sound)))
            assert isinstance(error, errors.ModelUnsupportedError), error
            assert re.search(r"model-.*safetensors cannot be read at byte \d+ \(Input", str(error))
        broken.unlink()
        client.load(str(sound))
        assert client.complete("def", options=SHORT).eval_count == 3
        loads.assert_no_tasks_left(22)
