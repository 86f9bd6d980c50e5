"""The BLAS choice stored by doctor, and the checks before a start uses the choice."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner_client.host.blas import Blas
from runner_client.host.blas_choice import Choice, cache_file, choose_blas, recall, remember

CPU = "processor : 0\nmodel name : Some CPU\ncpu family : 25\nmodel : 17\nflags : avx2 fma\n\n"


class Machine:
    """Root folder with two BLAS libraries and a cache folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {"XDG_CACHE_HOME": str(root / "cache")}
        self.file = root / "cache/mlx-runner/blas.json"
        self.set_cpu(CPU)
        self.openblas = Blas("OpenBLAS", self._library("libopenblas.so.0"), {"CORE": "NEW"})
        self.mkl = Blas("MKL", self._library("libmkl_rt.so.3"))
        self.libraries: tuple[Blas, ...] = (self.openblas, self.mkl)

    def _library(self, name: str) -> Path:
        path = self.root / name
        path.write_bytes(b"\x7fELF")
        return path

    def set_cpu(self, text: str) -> None:
        """Write ``/proc/cpuinfo``."""
        (self.root / "proc").mkdir(exist_ok=True)
        (self.root / "proc/cpuinfo").write_text(text)

    def remember(self, blas: Blas | None) -> None:
        """Store a choice in the cache file."""
        path = remember(self.environment, Choice(blas), self.libraries, root=self.root)
        assert path == self.file

    def recall(self) -> Choice | None:
        """Read the stored choice."""
        return recall(self.environment, self.libraries, root=self.root)

    def write(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Apply a change to the stored record."""
        record = json.loads(self.file.read_text())
        change(record)
        self.file.write_text(json.dumps(record))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_a_file_there_is_no_choice(machine: Machine) -> None:
    assert machine.recall() is None


def test_every_choice_is_stored_and_read_back(machine: Machine) -> None:
    plain = Blas("OpenBLAS", machine.openblas.path)
    for blas in (machine.openblas, plain, machine.mkl, None):
        machine.remember(blas)
        assert machine.recall() == Choice(blas)
    assert list(machine.file.parent.iterdir()) == [machine.file]


def test_only_the_owner_can_read_the_file(machine: Machine) -> None:
    machine.remember(machine.mkl)
    assert machine.file.stat().st_mode & 0o077 == 0
    assert machine.file.parent.stat().st_mode & 0o077 == 0


def _grow(machine: Machine) -> None:
    machine.mkl.path.write_bytes(b"\x7fELF and more")


def _touch(machine: Machine) -> None:
    os.utime(machine.mkl.path, ns=(1, 1))


def _other_cpu(machine: Machine) -> None:
    machine.set_cpu(CPU.replace("Some", "Another"))


def _other_generation(machine: Machine) -> None:
    machine.set_cpu(CPU.replace("17", "18"))


def _arm_cpu(machine: Machine) -> None:
    machine.set_cpu("processor : 0\nCPU implementer : 0x41\nCPU part : 0xd40\n\n")


def _uninstall(machine: Machine) -> None:
    machine.libraries = (machine.openblas,)


def _install(machine: Machine) -> None:
    machine.libraries = (*machine.libraries, Blas("BLIS", machine._library("libblis.so.4")))


@pytest.mark.parametrize(
    "change", [_grow, _touch, _other_cpu, _other_generation, _arm_cpu, _uninstall, _install]
)
def test_a_changed_machine_invalidates_the_choice(
    machine: Machine, change: Callable[[Machine], None]
) -> None:
    machine.remember(machine.openblas)
    change(machine)
    assert machine.recall() is None


def test_other_kernels_for_the_cpu_invalidate_the_choice(machine: Machine) -> None:
    machine.remember(machine.openblas)
    machine.libraries = (Blas("OpenBLAS", machine.openblas.path, {"CORE": "NEWER"}), machine.mkl)
    assert machine.recall() is None


@pytest.mark.parametrize(
    "choice",
    [
        {"path": "/opt/evil.so", "env": {}},
        {"path": "libopenblas.so.0", "env": {"CORE": "NEW"}},
        {"path": "OPENBLAS", "env": {"CORE": "NEW", "LD_LIBRARY_PATH": "/opt"}},
        {"path": "OPENBLAS", "env": {"CORE": "OLD"}},
        {"path": "OPENBLAS:/opt/evil.so", "env": {"CORE": "NEW"}},
        {"path": ["OPENBLAS"], "env": {}},
        {"path": "OPENBLAS"},
        "OPENBLAS",
        None,
        [],
        7,
    ],
)
def test_a_choice_that_is_not_an_installed_library_is_ignored(
    machine: Machine, choice: object
) -> None:
    machine.remember(machine.openblas)
    real = str(machine.openblas.path)
    text = json.dumps(choice).replace("OPENBLAS", real)
    machine.write(lambda record: record.update(choice=json.loads(text)))
    assert machine.recall() is None


def test_a_file_without_a_choice_is_ignored(machine: Machine) -> None:
    machine.remember(machine.openblas)
    machine.write(lambda record: record.pop("choice"))
    assert machine.recall() is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"choice": {}}',
        b"\xff\xfe\x00",
        b"[" * 60_000,
        b'{"format": ' + b"9" * 10_000 + b"}",
        b" " * 10_000_000,
    ],
    ids=["empty", "cut", "null", "list", "bare", "binary", "deep", "number", "huge"],
)
def test_a_file_that_is_not_a_record_is_ignored(machine: Machine, content: bytes) -> None:
    machine.file.parent.mkdir(parents=True)
    machine.file.write_bytes(content)
    assert machine.recall() is None


def test_an_oversized_file_is_not_read(machine: Machine) -> None:
    machine.remember(machine.openblas)
    with machine.file.open("a") as file:
        file.write(" " * 65_536)
    assert machine.recall() is None


def test_a_folder_or_a_pipe_instead_of_the_file_is_ignored(machine: Machine) -> None:
    machine.file.mkdir(parents=True)
    assert machine.recall() is None
    machine.file.rmdir()
    os.mkfifo(machine.file)
    # Without a writer, reading the pipe would block indefinitely.
    seen: list[Choice | None] = []
    reader = threading.Thread(target=lambda: seen.append(machine.recall()), daemon=True)
    reader.start()
    reader.join(10)
    assert seen == [None]


def test_a_corrupt_file_is_replaced(machine: Machine) -> None:
    machine.file.parent.mkdir(parents=True)
    machine.file.write_bytes(b"{")
    machine.remember(machine.mkl)
    assert machine.recall() == Choice(machine.mkl)


def test_a_cache_path_that_is_a_file_is_an_error(machine: Machine) -> None:
    (machine.root / "cache").touch()
    with pytest.raises(OSError, match="cache"):
        machine.remember(None)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/x", "HOME": "/h"}, "/x/mlx-runner/blas.json"),
        ({"HOME": "/h"}, "/h/.cache/mlx-runner/blas.json"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/mlx-runner/blas.json"),
        ({"XDG_CACHE_HOME": "", "HOME": ""}, None),
        ({"HOME": "relative"}, None),
        ({}, None),
    ],
)
def test_the_path_follows_xdg_cache_home_and_home(
    environment: dict[str, str], expected: str | None
) -> None:
    assert cache_file(environment) == (expected and Path(expected))


def test_without_a_cache_folder_storing_raises_and_reading_finds_nothing(machine: Machine) -> None:
    with pytest.raises(OSError, match="neither XDG_CACHE_HOME nor HOME"):
        remember({}, Choice(None), machine.libraries)
    assert recall({}, machine.libraries) is None


def test_a_start_uses_the_stored_choice_or_the_first_library(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runner_client.host.blas_choice.installed_blas", lambda: machine.libraries)
    assert choose_blas(machine.environment) == machine.openblas
    for blas in (machine.mkl, None):
        remember(machine.environment, Choice(blas), machine.libraries)
        assert choose_blas(machine.environment) == blas
    machine.file.write_text("{}")
    assert choose_blas(machine.environment) == machine.openblas
    machine.libraries = ()
    assert choose_blas(machine.environment) is None


def test_a_removed_library_invalidates_the_choice(machine: Machine) -> None:
    machine.remember(machine.mkl)
    machine.libraries[0].path.unlink()
    assert machine.recall() is None
