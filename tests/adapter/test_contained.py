"""Library code which exits the process on import, or prints where the ready line is expected."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from runner_common.memory.need_query import NeedRequest
from runner_server.engine.backend import LoadedModel
from runner_server.errors import ModelUnsupported

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

Build = Callable[..., Path]
Load = Callable[..., LoadedModel]


@pytest.fixture
def olmo_dir(model_dir: Build, tmp_path: Path) -> Path:
    """A model whose mlx_lm module calls ``sys.exit`` on import."""
    path = Path(shutil.copytree(model_dir(), tmp_path / "m"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "olmo"}))
    return path


def test_a_model_whose_module_exits_on_import_is_refused(
    load: Load, olmo_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        with pytest.raises(ModelUnsupported, match=r"exit code 1.*install ai2-olmo"):
            load(olmo_dir)
    assert capfd.readouterr().out == ""


def test_an_estimate_for_such_a_model_reports_the_refusal(olmo_dir: Path) -> None:
    request = json.dumps(asdict(NeedRequest(str(olmo_dir))))
    done = subprocess.run(
        [sys.executable, "-m", "runner_server.mlx_backend.estimating", request],
        capture_output=True,
        check=True,
    )
    (line,) = done.stdout.splitlines()
    assert json.loads(line)["reason"] == "MODEL_UNSUPPORTED"
