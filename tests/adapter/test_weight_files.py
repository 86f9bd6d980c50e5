"""Weight files read by this process: values, the time of reading, and read errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from runner_common.safetensors import HeaderError
from runner_server.errors import ModelUnsupported
from support.safetensors_files import header_of, write_file, write_tensors

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.loading import lazy_arrays, weight_files  # noqa: E402
from runner_server.mlx_backend.loading.weight_files import BLOCK_BYTES, WeightFiles  # noqa: E402

TYPES = [
    *(mx.float32, mx.float16, mx.bfloat16, mx.complex64, mx.bool_),
    *(mx.int8, mx.int16, mx.int32, mx.int64, mx.uint8, mx.uint16, mx.uint32, mx.uint64),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


class Reads:
    """Records calls of ``os.preadv``; ``answer`` replaces the implementation.

    Args:
        monkeypatch: Restores ``os.preadv`` after the test.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.preadv = os.preadv
        self.answer: Callable[[int, list[memoryview], int], int] = self.preadv
        monkeypatch.setattr(os, "preadv", self._read)

    def _read(self, file: int, buffers: list[memoryview], position: int) -> int:
        self.sizes.append(len(buffers[0]))
        return self.answer(file, buffers, position)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


def _read(files: WeightFiles, arrays: object, on_read: Callable[[int], object] = bool) -> None:
    with files.reading(on_read):
        mx.eval(arrays)
    files.check()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_dtype_matches_mlx_load(path: Path, dtype: Any) -> None:
    random = (mx.random.normal((37, 53)) * 100).astype(dtype)
    arrays = {"x": random, "one": mx.array(1).astype(dtype), "line": mx.arange(5).astype(dtype)}
    mx.save_safetensors(str(path), arrays | {"none": mx.zeros((0, 4), dtype=dtype)})
    found, expected = WeightFiles().load(str(path)), mx.load(str(path))
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert mx.array_equal(found[name], value, equal_nan=True).item()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E8M0"])
def test_8_bit_floats_are_read_as_bytes(path: Path, dtype: str) -> None:
    header = {"x": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    write_file(path, header, 4)
    assert WeightFiles().load(str(path))["x"].dtype == mx.uint8


@pytest.mark.parametrize("name", ["x.npy", "a/b", "", "ü 日本 😀", "0", "a" * 5000])
def test_any_tensor_name_is_preserved(path: Path, name: str) -> None:
    write_tensors(path, {name: ("F32", (2,)), "1": ("F32", (3,))})
    found = WeightFiles().load(str(path))
    assert {key: value.shape for key, value in found.items()} == {name: (2,), "1": (3,)}


def test_tensors_are_read_on_evaluation(path: Path, reads: Reads) -> None:
    write_tensors(path, {"wide": ("F32", (1 << 18, 1 << 18)), "small": ("F32", (3,))})
    before = mx.get_active_memory()
    arrays = WeightFiles().load(str(path))
    sums = arrays["wide"].sum(), arrays["small"].sum()
    assert (reads.sizes, mx.get_active_memory()) == ([], before)
    assert sums[1].item() == 0
    assert reads.sizes == [12]


def test_large_tensors_are_read_in_chunks(path: Path, reads: Reads) -> None:
    size = 5 * BLOCK_BYTES // 2
    arrays = {"x": mx.arange(size // 4), "y": mx.arange(6)}
    mx.save_safetensors(str(path), arrays)
    reported: list[int] = []
    files = WeightFiles()
    found = files.load(str(path))
    _read(files, found, reported.append)
    assert (
        sorted(reads.sizes) == sorted(reported) == [24, BLOCK_BYTES // 2, BLOCK_BYTES, BLOCK_BYTES]
    )
    assert all(mx.array_equal(found[name], arrays[name]).item() for name in arrays)


def test_short_reads_are_continued(path: Path, reads: Reads) -> None:
    values = mx.arange(1000)
    mx.save_safetensors(str(path), {"x": values})
    reads.answer = lambda file, buffers, at: reads.preadv(file, [buffers[0][:999]], at)
    files = WeightFiles()
    found = files.load(str(path))
    _read(files, found)
    assert reads.sizes == [4000, 3001, 2002, 1003, 4]
    assert mx.array_equal(found["x"], values).item()


def _failing(_file: int, _buffers: list[memoryview], _position: int) -> int:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("elements", [10, BLOCK_BYTES])
def test_a_disk_error_is_reported(
    path: Path, reads: Reads, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    # A failed read must not keep a stream open, for which the end of reading would wait.
    monkeypatch.setattr(weight_files, "_UNUSED_SECONDS", 3600)
    mx.save_safetensors(str(path), {"layer.x": mx.ones(elements)})
    files = WeightFiles()
    found = files.load(str(path))
    reads.answer = _failing
    with pytest.raises(ModelUnsupported) as caught:
        _read(files, found)
    for part in (str(path), "layer.x", "Input/output error", "byte"):
        assert part in str(caught.value)
    assert caught.value.metadata == {"model": str(path.parent)}
    files.check()  # reported once only


@pytest.mark.parametrize("elements", [100, 3 * BLOCK_BYTES])
def test_a_shrinking_file_is_reported(path: Path, elements: int) -> None:
    mx.save_safetensors(str(path), {"x": mx.ones(elements)})
    files = WeightFiles()
    found = files.load(str(path))
    end = path.stat().st_size - 7
    os.truncate(path, end)
    with pytest.raises(ModelUnsupported, match=f"has only {end} bytes now, too few for x"):
        _read(files, found)


def test_a_replaced_file_is_read_from_the_open_descriptor(path: Path) -> None:
    mx.save_safetensors(str(path), {"x": mx.ones(100)})
    files = WeightFiles()
    found = files.load(str(path))
    path.unlink()
    path.write_bytes(b"")
    _read(files, found)
    assert found["x"].sum().item() == 100


def test_an_exception_in_the_callback_ends_the_reading(path: Path, reads: Reads) -> None:
    class StoppedError(Exception):
        pass

    def stop(_nbytes: int) -> None:
        raise StoppedError

    mx.save_safetensors(str(path), {str(i): mx.ones(10) for i in range(50)})
    files = WeightFiles()
    found = files.load(str(path))
    with pytest.raises(StoppedError):
        _read(files, found, stop)
    assert len(reads.sizes) <= 4 * 2  # reads already begun on MLX's threads


def test_a_directory_is_not_a_weight_file(path: Path) -> None:
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        WeightFiles().load(str(path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_raises_permission_error(path: Path) -> None:
    write_tensors(path, {"x": ("F32", (2,))})
    path.chmod(0)
    with pytest.raises(PermissionError, match=r"model\.safetensors"):
        WeightFiles().load(str(path))


def test_a_false_header_is_refused(path: Path) -> None:
    header = header_of({"x": ("F32", (2,))})
    write_file(path, header, 7)
    with pytest.raises(HeaderError, match="cut short"):
        WeightFiles().load(str(path))


@pytest.mark.parametrize(
    ("dtype", "shape", "size"), [("F64", [1], 8), ("F8_E5M2", [1], 1), ("F32", [0, 2**31], 0)]
)
def test_tensors_unsupported_by_mlx_are_refused(
    path: Path, dtype: str, shape: list[int], size: int
) -> None:
    write_file(path, {"odd": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}, size)
    with pytest.raises(ValueError, match="odd"):
        WeightFiles().load(str(path))


def _open_count() -> int:
    return psutil.Process().num_fds()


def test_the_file_is_closed_after_the_last_read(path: Path) -> None:
    before = _open_count()
    mx.save_safetensors(str(path), {"x": mx.ones(3), "y": mx.ones(3)})
    files = WeightFiles()
    found = files.load(str(path))
    assert _open_count() == before + 1
    _read(files, found)
    assert _open_count() == before


def test_the_file_is_closed_when_its_arrays_are_dropped(path: Path) -> None:
    before = _open_count()
    write_tensors(path, {"x": ("F32", (2,))})
    WeightFiles().load(str(path))
    assert _open_count() == before


def test_mlx_reads_the_file_if_it_opens_archives_without_python(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(*_args: object) -> Any:
        raise RuntimeError("[load_npz] Failed to open file")

    monkeypatch.setattr(weight_files, "lazy_arrays", unknown)
    mx.save_safetensors(str(path), {"x": mx.ones(3)})
    assert WeightFiles().load(str(path))["x"].sum().item() == 3
    assert "may make it hang" in caplog.text


def test_other_threads_may_use_zipfile_meanwhile(tmp_path: Path) -> None:
    with lazy_arrays._opening_archives():
        import zipfile as found  # as another thread may do just then

        assert found is not zipfile
        with found.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("name", "text")
        assert found.is_zipfile(tmp_path / "x.zip")
        assert isinstance(archive, zipfile.ZipFile)
    assert sys.modules["zipfile"] is zipfile
    with found.ZipFile(tmp_path / "x.zip") as archive:
        assert archive.read("name") == b"text"


EVALUATE = """
import os, sys
import mlx.core as mx
from runner_server.mlx_backend.loading.weight_files import WeightFiles
arrays = WeightFiles().load(sys.argv[1])
for call, x in zip(sys.argv[2:], arrays.values()):
    print(call, float(eval(call)), flush=True)
os._exit(0)
"""
CALLS = [
    *("x[0].item()", "x.tolist()[0]", "float(x[0])", "int(x[0])", "1.0 if x[0] == 1 else 0"),
    *("memoryview(x)[0]", "str(x)[7]", "next(iter(x)).item()", "mx.array_equal(x, x).item()"),
    *("mx.eval(x) or 1", "mx.async_eval(x) or x[0].item()"),
]
if hasattr(mx.array, "__index__"):  # not in MLX 0.32.2
    CALLS.append("[0, 1][x[0].astype(mx.int32)]")


def test_calls_that_evaluate_release_the_gil(path: Path) -> None:
    """Runs in a child process, because a call that keeps the GIL would never return."""
    mx.save_safetensors(str(path), {str(i): mx.ones(8) for i in range(len(CALLS))})
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, str(path), *CALLS],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stdout.splitlines() == [f"{call} 1.0" for call in CALLS]


ENDING = """
import sys
import mlx.core as mx
from runner_server.mlx_backend.loading.weight_files import WeightFiles
files = WeightFiles()
arrays = files.load(sys.argv[1])
with files.reading(bool):
    mx.eval(arrays)
"""


def test_a_process_may_exit_right_after_reading(path: Path) -> None:
    mx.save_safetensors(str(path), {str(i): mx.ones(8) for i in range(20)})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for _ in range(5):
        subprocess.run(
            [sys.executable, "-c", ENDING, str(path)], env=environment, check=True, timeout=60
        )
