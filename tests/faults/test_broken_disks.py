"""Fault 7: broken model files, changes during a load, and read errors.

tests/adapter/test_broken_models.py has these and more cases without a process. Here a real child
refuses each with a typed error that names the file, and works afterwards.
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
from support.sweeps import sampled

pytestmark = pytest.mark.mlx

Build = Callable[..., Path]
Break = Callable[[Path], object]
SHORT = Options(num_predict=3, temperature=0)
DEADLINE_SECONDS = 60.0
"""Time after which a call counts as hung; importing transformers takes seconds under load."""
SECOND = "model-00002-of-00003.safetensors"


def _change_config(**changes: object) -> Break:
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))

    return change


def _remove(name: str) -> Break:
    return lambda path: (path / name).unlink()


def _truncate(path: Path) -> None:
    file = path / SECOND
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - 1000])


Entries = dict[str, dict[str, Any]]


def _change_header(change: Callable[[Entries], object]) -> Break:
    """Return a change to the header of a shard; the data stays."""

    def apply(path: Path) -> None:
        file = path / SECOND
        data = file.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        change({name: entry for name, entry in header.items() if name != "__metadata__"})
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])

    return apply


def _extend_last_tensor(entries: Entries) -> None:
    """Extend the last tensor beyond the end of the file, with a matching shape."""
    entry = max(entries.values(), key=lambda each: each["data_offsets"][0])
    first, last = entry["data_offsets"]
    entry["data_offsets"] = [first, last + 10**9]
    entry["shape"] = [(last + 10**9 - first) // 4]


def _move_tensors_beyond_end(entries: Entries) -> None:
    """Move every tensor beyond the end of the file, with the right length."""
    for entry in entries.values():
        first, last = entry["data_offsets"]
        entry["data_offsets"] = [first + 10**12, last + 10**12]


def _mismatch_shapes(entries: Entries) -> None:
    """Give every tensor a shape too large for the length of the data."""
    for entry in entries.values():
        entry["shape"] = [2**40, 2**20]


def _claim_header_length(length: int) -> Break:
    def apply(path: Path) -> None:
        file = path / SECOND
        file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])

    return apply


def _replace_with_folder(name: str) -> Break:
    """Return a change of a file to a directory, which not even root can read."""

    def apply(path: Path) -> None:
        (path / name).unlink()
        (path / name).mkdir()

    return apply


DAMAGE: dict[str, tuple[Break, str]] = {
    "a shard is missing": (_remove(SECOND), SECOND),
    "a shard is truncated": (_truncate, SECOND),
    "a tensor longer than the file": (_change_header(_extend_last_tensor), SECOND),
    "tensors beyond the end": (_change_header(_move_tensors_beyond_end), SECOND),
    "a shape of another size": (_change_header(_mismatch_shapes), SECOND),
    "a header longer than the file": (_claim_header_length(2**40), SECOND),
    "a header of 2**63 bytes": (_claim_header_length(2**63), SECOND),
    "a header of 0 bytes": (_claim_header_length(0), SECOND),
    "great width": (_change_config(hidden_size=2 * 10**9), "config.json"),
    "absurd width": (_change_config(hidden_size=10**12), "config.json"),
    "absurd vocabulary": (_change_config(vocab_size=10**12), "config.json"),
    "absurd depth": (_change_config(num_hidden_layers=10**9), "config.json"),
    "absurd heads": (
        _change_config(num_attention_heads=10**9, num_key_value_heads=10**9),
        "config.json",
    ),
    "negative depth": (_change_config(num_hidden_layers=-1), "config.json"),
    "absurd depth of the text model": (
        _change_config(num_hidden_layers=None, text_config={"num_hidden_layers": 10**9}),
        "config.json",
    ),
    "numbers of a million digits": (
        lambda path: (path / "config.json").write_text('{"model_type": ' + "9" * 10**6 + "}"),
        "config.json",
    ),
    "a deeply nested config": (
        lambda path: (path / "config.json").write_text("[" * 10**6),
        "config.json",
    ),
    "absurd context": (_change_config(max_position_embeddings=10**30), "config.json"),
    "no tokenizer": (_remove("tokenizer.json"), "tokenizer"),
    "config.json cannot be read": (_replace_with_folder("config.json"), "config.json"),
    "a shard cannot be read": (_replace_with_folder(SECOND), SECOND),
    "tokenizer.json cannot be read": (_replace_with_folder("tokenizer.json"), "tokenizer"),
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
    """Return the client of the runner; the runner itself loads only one model."""
    return runner.client


@pytest.mark.parametrize("is_loaded", [True, False])
@pytest.mark.parametrize("case", DAMAGE)
def test_the_server_names_the_file_and_keeps_working(
    runner: RunnerProcess,
    client: RunnerClient,
    loads: CountedLoads,
    sound: Path,
    copy: Path,
    case: str,
    is_loaded: bool,
) -> None:
    """With a model loaded, most damage is found before that model is given up."""
    damage, named = DAMAGE[case]
    damage(copy)
    if not is_loaded:
        client.unload()
    pid = pid_of(runner)
    held = psutil.Process(pid).memory_info().rss
    began = time.monotonic()
    error = end_of(lambda: client.load(str(copy)))
    assert time.monotonic() - began < DEADLINE_SECONDS
    assert isinstance(error, errors.ModelUnsupportedError | errors.InsufficientMemoryError), error
    assert named in str(error), str(error)
    assert psutil.Process(pid).memory_info().rss < held + 64 * 2**20
    client.load(str(sound))
    assert client.complete("def", options=SHORT).eval_count == 3
    loads.assert_no_tasks_left(1 if is_loaded else 2)


@pytest.mark.parametrize("case", sampled(DAMAGE, [*DAMAGE][::2]))
def test_the_gate_names_the_file_or_lets_the_server_judge(copy: Path, case: str) -> None:
    """The gate reads only headers; any error is typed, and nothing hangs."""
    damage, named = DAMAGE[case]
    damage(copy)
    began = time.monotonic()
    error = end_of(lambda: MemoryGate().check(estimation.estimate(str(copy)), override=False))
    assert time.monotonic() - began < DEADLINE_SECONDS
    if isinstance(error, errors.ModelUnsupportedError):
        assert named in str(error), str(error)
    else:
        assert error is None or isinstance(error, errors.InsufficientMemoryError)


WAIT_BEFORE_READING = """
import os, time
from runner_server.engine.request_registry import RequestRegistry
note_progress = RequestRegistry.note_progress

def wait(self, progress):
    note_progress(self, progress)
    # At 5 %, all sizes are known and no weight has been read.
    while progress == 5 and not os.path.exists({go!r}):
        time.sleep(0.01)

RequestRegistry.note_progress = wait
"""


def _truncate_to_4_kib(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(4096)


def _replace_with_empty_file(file: Path) -> None:
    """Replace the file with an empty one, as a restarted download does."""
    file.unlink()
    file.write_bytes(b"")


@pytest.mark.parametrize("change", [_truncate_to_4_kib, _replace_with_empty_file])
def test_a_shard_that_changes_during_a_load_is_read_or_named(
    sound: Path, copy: Path, tmp_path: Path, change: Break
) -> None:
    """The shard changes when the sizes are known but the data has not been read."""
    (tmp_path / "hook").mkdir()
    go, loads = tmp_path / "go", CountedLoads(tmp_path)
    env = hooked(tmp_path / "hook", WAIT_BEFORE_READING.format(go=str(go)) + loads.code)
    go.touch()
    with RunnerProcess(str(copy), env=env) as runner, in_threads(1) as pool:
        client = runner.client
        go.unlink()
        load = pool.submit(end_of, lambda: client.load(str(copy)))
        wait_until(lambda: client.status().progress == 5)
        change(copy / SECOND)
        go.touch()
        error = load.result(20)
        # An open file can still be read after its removal from the folder.
        if change is _truncate_to_4_kib or error:
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


def test_read_errors_name_the_file_and_the_server_keeps_working(
    sound: Path, tmp_path: Path
) -> None:
    (tmp_path / "hook").mkdir()
    broken, loads = tmp_path / "broken", CountedLoads(tmp_path)
    env = hooked(tmp_path / "hook", FAILING_READS.format(broken=str(broken)) + loads.code)
    with RunnerProcess(str(sound), env=env) as runner:
        client = runner.client
        broken.touch()
        for _ in range(20):
            error = end_of(lambda: client.load(str(sound)))
            assert isinstance(error, errors.ModelUnsupportedError), error
            assert re.search(r"model-.*safetensors cannot be read at byte \d+ \(Input", str(error))
        broken.unlink()
        client.load(str(sound))
        assert client.complete("def", options=SHORT).eval_count == 3
        loads.assert_no_tasks_left(22)
