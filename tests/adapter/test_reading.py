"""How lazy weights are read: in order, so many bytes at the same time, and nothing after an end."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from runner_server.errors import InsufficientMemory, ModelUnsupported

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.adapter import _reading  # noqa: E402 - after importorskip

LIMIT = 100


class Library:
    """Stands for MLX: notes what was begun and what was waited for.

    Args:
        fails_at: Which array cannot be read, and with what.
    """

    def __init__(self, fails_at: dict[int, Exception] | None = None) -> None:
        self.fails_at = fails_at or {}
        self.flying: list[Any] = []
        self.most_bytes = 0
        self.most_count = 0

    cpu = None

    def default_stream(self, device: Any) -> Any:
        """The only one."""
        return device

    def synchronize(self, stream: Any) -> None:
        """Nothing is left behind here."""

    def async_eval(self, array: Any) -> None:
        """Begins an array."""
        if error := self.fails_at.get(array.name):
            raise error
        self.flying.append(array)
        self.most_bytes = max(self.most_bytes, sum(item.nbytes for item in self.flying))
        self.most_count = max(self.most_count, len(self.flying))

    def eval(self, arrays: Any) -> None:
        """Waits for arrays."""
        for array in arrays if isinstance(arrays, list) else [arrays]:
            self.flying.remove(array)


def _weights(*sizes: int) -> list[Any]:
    return [SimpleNamespace(name=name, nbytes=size) for name, size in enumerate(sizes)]


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    library = Library()
    monkeypatch.setattr(_reading, "mx", library)
    monkeypatch.setattr(_reading, "_AT_ONCE_BYTES", LIMIT)
    return library


def test_small_ones_are_read_together_within_the_limit(library: Library) -> None:
    shares: list[float] = []
    _reading.read_weights(_weights(*[30] * 10), shares.append)
    assert shares == pytest.approx([i / 10 for i in range(1, 11)])
    assert (library.most_count, library.most_bytes) == (3, 90)
    assert library.flying == []


def test_one_beyond_the_limit_is_read_alone(library: Library) -> None:
    _reading.read_weights(_weights(10, 500, 10, 500, 500), lambda _share: None)
    assert (library.most_count, library.most_bytes) == (1, 500)


def test_the_end_by_a_report_waits_for_what_was_begun(library: Library) -> None:
    class StoppedError(Exception):
        pass

    def report(share: float) -> None:
        assert library.flying
        if share > 0.2:
            raise StoppedError

    with pytest.raises(StoppedError):
        _reading.read_weights(_weights(*[30] * 10), report)
    assert library.flying == []


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (RuntimeError("[malloc] Unable to allocate 7 bytes"), InsufficientMemory),
        (MemoryError(), InsufficientMemory),
        (RuntimeError("[read] unexpected end"), ModelUnsupported),
    ],
)
def test_what_fails_is_told_and_nothing_is_left(
    library: Library, error: Exception, fault: type[Exception]
) -> None:
    library.fails_at = {2: error}
    with pytest.raises(fault) as caught:
        _reading.read_weights(_weights(*[30] * 10), lambda _share: None)
    assert caught.value.__cause__ is error
    assert library.flying == []


def test_no_weights_are_no_fault(library: Library) -> None:
    _reading.read_weights([], lambda _share: None)
    assert library.most_count == 0


@pytest.mark.parametrize("limit", [0, 2**10, 2**30])
def test_real_arrays_are_right_however_many_are_read_at_once(
    monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(_reading, "_AT_ONCE_BYTES", limit)
    weights = [(mx.arange(100) + i).astype(mx.float32) for i in range(20)]
    shares: list[float] = []
    _reading.read_weights(weights, shares.append)
    assert shares == sorted(shares)
    assert len(shares) == 20
    assert [value[99].item() for value in weights] == [99 + i for i in range(20)]


def test_a_file_that_cannot_be_read_harms_nothing_that_comes_later(tmp_path: Path) -> None:
    """MLX keeps errors of its reading threads and raises them in whatever is called next."""
    for i in range(200):
        # Another file each time: reads that were begun may not be over yet.
        path = tmp_path / f"{i % 4}.safetensors"
        mx.save_safetensors(str(path), {str(name): mx.ones((8, 1024)) for name in range(30)})
        weights = mx.load(str(path))
        os.truncate(path, 4096)
        with pytest.raises(ModelUnsupported):
            _reading.read_weights(list(weights.values()), lambda _done: None)
        mx.eval(mx.ones(4) * 2)
        mx.synchronize()
