"""Reading of lazy weights: in order, with bounded bytes in flight, and none after an error."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner_server.errors import InsufficientMemory, ModelUnsupported
from support.mlx_tasks import assert_no_tasks_left

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.loading import reading  # noqa: E402 - after importorskip
from runner_server.mlx_backend.loading.weight_files import WeightFiles  # noqa: E402

LIMIT = 100


class Library:
    """Stand-in for MLX which records evaluations begun and awaited.

    Args:
        fails_at: Errors by the name of the array that raises them.
    """

    def __init__(self, fails_at: dict[int, Exception] | None = None) -> None:
        self.fails_at = fails_at or {}
        self.in_flight: list[Any] = []
        self.most_bytes = 0
        self.most_count = 0

    def async_eval(self, array: Any) -> None:
        """Begin the evaluation of an array."""
        if error := self.fails_at.get(array.name):
            raise error
        self.in_flight.append(array)
        self.most_bytes = max(self.most_bytes, sum(item.nbytes for item in self.in_flight))
        self.most_count = max(self.most_count, len(self.in_flight))

    def eval(self, arrays: Any) -> None:
        """Wait for arrays."""
        for array in arrays if isinstance(arrays, list) else [arrays]:
            self.in_flight.remove(array)


def _read(weights: list[Any], report: Callable[[float], None]) -> None:
    reading.read_weights(weights, report, WeightFiles())


def _weights(*sizes: int) -> list[Any]:
    return [SimpleNamespace(name=name, nbytes=size) for name, size in enumerate(sizes)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(reading, "mx", library)
    monkeypatch.setattr(reading, "_AT_ONCE_BYTES", LIMIT)
    return library


def test_small_weights_are_read_together_within_the_limit(library: Library) -> None:
    shares: list[float] = []
    _read(_weights(*[30] * 10), shares.append)
    assert shares == pytest.approx([i / 10 for i in range(1, 11)])
    assert (library.most_count, library.most_bytes) == (3, 90)
    assert library.in_flight == []


def test_a_weight_beyond_the_limit_is_read_alone(library: Library) -> None:
    _read(_weights(10, 500, 10, 500, 500), lambda _share: None)
    assert (library.most_count, library.most_bytes) == (1, 500)


def test_an_abort_by_a_report_waits_for_reads_in_flight(library: Library) -> None:
    def report(share: float) -> None:
        assert library.in_flight
        if share > 0.2:
            raise StoppedError

    with pytest.raises(StoppedError):
        _read(_weights(*[30] * 10), report)
    assert library.in_flight == []


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError("[malloc] Unable to allocate 7 bytes"), InsufficientMemory),
        (MemoryError(), InsufficientMemory),
        (RuntimeError("[read] unexpected end"), ModelUnsupported),
    ],
)
def test_a_failed_read_is_reported_and_leaves_nothing_in_flight(
    library: Library, error: Exception, fault: type[Exception]
) -> None:
    library.fails_at = {2: error}
    with pytest.raises(fault) as caught:
        _read(_weights(*[30] * 10), lambda _share: None)
    assert caught.value.__cause__ is error
    assert library.in_flight == []


def test_reading_no_weights_succeeds(library: Library) -> None:
    _read([], lambda _share: None)
    assert library.most_count == 0


@pytest.mark.parametrize("limit", [0, 2**10, 2**30])
def test_arrays_are_correct_for_any_limit(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(reading, "_AT_ONCE_BYTES", limit)
    weights = [(mx.arange(100) + i).astype(mx.float32) for i in range(20)]
    shares: list[float] = []
    _read(weights, shares.append)
    assert shares == sorted(shares)
    assert len(shares) == 20
    assert [value[99].item() for value in weights] == [99 + i for i in range(20)]


class StoppedError(Exception):
    """Raised by a progress report to end a load."""


def _lazy(path: Path, **arrays: Any) -> tuple[WeightFiles, list[Any]]:
    mx.save_safetensors(str(path), arrays)
    files = WeightFiles()
    return files, list(files.load(str(path)).values())


def test_progress_is_reported_within_one_weight(tmp_path: Path) -> None:
    files, weights = _lazy(tmp_path / "x.safetensors", x=mx.ones((8, 2**20)))
    shares: list[float] = []
    threads: set[str] = set()

    def report(share: float) -> None:
        shares.append(share)
        threads.add(threading.current_thread().name)

    reading.read_weights(weights, report, files)
    assert shares == sorted(shares)
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert len(threads) > 1


@pytest.mark.parametrize("at", [0.2, 0.9])
def test_a_report_can_abort_within_one_weight(tmp_path: Path, at: float) -> None:
    files, weights = _lazy(tmp_path / "x.safetensors", x=mx.ones((16, 2**20)))
    shares: list[float] = []

    def report(share: float) -> None:
        shares.append(share)
        if share > at:
            raise StoppedError

    with pytest.raises(StoppedError):
        reading.read_weights(weights, report, files)
    assert sum(share > at for share in shares) == 1


def test_progress_of_a_conversion_stays_within_bounds(tmp_path: Path) -> None:
    """A source may be wider or narrower than the converted weight."""
    arrays = {"wide": mx.ones((4, 2**20)), "narrow": mx.ones((4, 2**20), dtype=mx.bfloat16)}
    files, weights = _lazy(tmp_path / "x.safetensors", **arrays)
    shares: list[float] = []
    converted = [value.astype(mx.float16) for value in weights]
    reading.read_weights(converted, shares.append, files)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert all(mx.array_equal(value, mx.ones((4, 2**20))).item() for value in converted)


def test_an_unreadable_file_does_not_affect_later_work(tmp_path: Path) -> None:
    for i in range(200):
        path = tmp_path / f"{i % 4}.safetensors"
        arrays = {str(name): mx.ones((8, 1024)) for name in range(30)}
        files, weights = _lazy(path, **arrays)
        os.truncate(path, 4096)
        with pytest.raises(ModelUnsupported, match=rf"{path.name} has only 4096 bytes"):
            reading.read_weights(weights, lambda _share: None, files)
        mx.eval(mx.ones(4) * 2)
        assert_no_tasks_left()
