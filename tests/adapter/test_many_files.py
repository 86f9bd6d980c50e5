"""Weights in hundreds of files, with a low limit on open files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

_LOAD = """
import resource, sys
from pathlib import Path
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, 256)
from runner_server.mlx_backend import MlxBackend
from runner_server.engine.types import LoadSpec
backend = MlxBackend()
backend.open()
print(backend.load(LoadSpec(sys.argv[1]), lambda _progress: None).info.weight_bytes)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (256, 256)
backend.close()
"""


def test_hundreds_of_files_load_with_a_low_limit_on_open_files(
    model_dir: Callable[..., Path],
) -> None:
    path = model_dir(num_hidden_layers=34, shards=300)
    done = subprocess.run(
        [
            "/bin/sh",
            "-c",
            'ulimit -n 256 && exec "$@"',
            "-",
            sys.executable,
            "-c",
            _LOAD,
            str(path),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


def test_a_reopened_file_must_be_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlx.core as mx

    from runner_server.errors import ModelUnsupported
    from runner_server.mlx_backend.loading import weight_files

    monkeypatch.setattr(weight_files, "_MOST_OPEN", 0)
    path = tmp_path / "model.safetensors"
    for is_replaced in (False, True):
        mx.save_safetensors(str(path), {"x": mx.ones(10)})
        files = weight_files.WeightFiles()
        found = files.load(str(path))
        if is_replaced:
            path.unlink()
            mx.save_safetensors(str(path), {"x": mx.zeros(10)})
        with files.reading(lambda _nbytes: None):
            mx.eval(found)
        if is_replaced:
            with pytest.raises(ModelUnsupported, match="is another file now"):
                files.check()
        else:
            files.check()
            assert found["x"].sum().item() == 10
