"""Directories without a usable model, or with code to run: a clear error, and nothing left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.errors import ModelNotFound, ModelUnsupported, RunnerFault
from runner_server.mlx_backend import MlxBackend
from support.rows import Row, run_alone

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

Build = Callable[..., Path]
Load = Callable[..., LoadedModel]
Break = Callable[[Path], object]


@pytest.fixture
def copy(model_dir: Build, tmp_path: Path) -> Path:
    """A copy of a sound model for each test."""
    return Path(shutil.copytree(model_dir(), tmp_path / "model"))


def _config(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not ...}
    (path / "config.json").write_text(json.dumps(config))


def _write(name: str, text: str) -> Break:
    return lambda path: (path / name).write_text(text)


def _remove(*names: str) -> Break:
    def remove(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return remove


def _cut(size: int) -> Break:
    def cut(path: Path) -> None:
        file = path / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:size] if size > 0 else data[: len(data) + size])

    return cut


def _change_weights(change: Callable[[dict[str, Any]], object]) -> Break:
    def apply(path: Path) -> None:
        file = path / "model.safetensors"
        weights = dict(mx.load(str(file)))
        mx.eval(weights)
        change(weights)
        mx.save_safetensors(str(file), weights)

    return apply


NORM = "model.norm.weight"
BROKEN: dict[str, tuple[Break, str]] = {
    "no config": (_remove("config.json"), "config.json"),
    "config is no JSON": (_write("config.json", "{"), "config.json"),
    "config is a list": (_write("config.json", "[]"), "config.json"),
    "config is a number": (_write("config.json", "7"), "config.json"),
    "config is binary": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe"), "config.json"),
    "no model_type": (lambda p: _config(p, model_type=...), "config.json"),
    "unknown model_type": (lambda p: _config(p, model_type="not_a_model"), "not_a_model"),
    "model_type is a path": (lambda p: _config(p, model_type="../../x"), "config.json"),
    "model_type is null": (lambda p: _config(p, model_type=None), "model_type"),
    "context is text": (lambda p: _config(p, max_position_embeddings="long"), "config.json"),
    "context is zero": (lambda p: _config(p, max_position_embeddings=0), "config.json"),
    "size is text": (lambda p: _config(p, hidden_size="64"), ""),
    "other size": (lambda p: _config(p, hidden_size=128), ""),
    "zero heads": (lambda p: _config(p, num_attention_heads=0), ""),
    "no weights": (_remove("model.safetensors"), "safetensors"),
    "weights are empty": (_write("model.safetensors", ""), "safetensors"),
    "weights are text": (_write("model.safetensors", "hello, not a header" * 9), "safetensors"),
    "weights end in the header": (_cut(40), "safetensors"),
    "weights end in the data": (_cut(-2000), "safetensors"),
    "a tensor is missing": (_change_weights(lambda w: w.pop(NORM)), NORM),
    "a tensor too many": (_change_weights(lambda w: w.update(extra=w[NORM])), "extra"),
    "a tensor of another shape": (_change_weights(lambda w: w.update({NORM: w[NORM][:3]})), NORM),
    "no tokenizer": (_remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "tokenizer is no JSON": (_write("tokenizer.json", "{"), "tokenizer"),
    "tokenizer is another thing": (_write("tokenizer.json", '{"a": 1}'), "tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_model_is_refused_with_a_clear_error(
    load: Load, backend: MlxBackend, copy: Path, tiny: LoadedModel, case: str
) -> None:
    damage, named = BROKEN[case]
    damage(copy)
    backend.release()
    before = mx.get_active_memory()
    fault = _fault(load, copy)
    assert isinstance(fault, ModelUnsupported), repr(fault)
    assert fault.metadata == {"model": str(copy)}
    assert named in str(fault)
    del fault
    backend.release()
    assert mx.get_active_memory() <= before + 4096
    # MLX still works.
    assert len(run_alone(tiny, Row([1, 2, 3], 3))) == 3


def test_a_tokenizer_made_up_by_transformers_is_refused(
    load: Load, model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(model_dir("qwen3"), tmp_path / "model"))
    _remove("tokenizer.json", "tokenizer_config.json")(path)
    fault = _fault(load, path)
    assert isinstance(fault, ModelUnsupported), repr(fault)
    assert "tokenizer" in str(fault)


CANARY = """
from pathlib import Path
Path(__file__).with_name("RAN").write_text("ran")
raise SystemExit("the model's own code ran")
"""


def _own_architecture(path: Path) -> None:
    _config(path, model_file="canary.py")


def _own_tokenizer(path: Path) -> None:
    config = {
        "tokenizer_class": "CanaryTokenizer",
        "auto_map": {"AutoTokenizer": ["canary.CanaryTokenizer", "canary.CanaryTokenizer"]},
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def _own_config(path: Path) -> None:
    _config(path, model_type="canary", auto_map={"AutoConfig": "canary.CanaryConfig"})


@pytest.mark.parametrize("damage", [_own_architecture, _own_tokenizer, _own_config])
def test_code_in_the_model_directory_never_runs(load: Load, copy: Path, damage: Break) -> None:
    (copy / "canary.py").write_text(CANARY)
    damage(copy)
    fault = _fault(load, copy)
    assert not (copy / "RAN").exists()
    # A tokenizer of a known kind may replace the custom class; its code may not run.
    assert fault is None or isinstance(fault, ModelUnsupported)
    assert damage is _own_tokenizer or fault is not None


def test_a_null_model_file_setting_is_accepted(load: Load, copy: Path) -> None:
    _config(copy, model_file=None)
    assert _fault(load, copy) is None


NOWHERE = [
    "/nowhere/at/all",
    "org/never-downloaded",
    "name",
    "a/b/c/d",
    "~nobody-of-this-name/model",
    "~/nothing-of-this-name",
    "../" * 50 + "x",
    "m" * 300,
    "m" * 4000,
    "/" + "d/" * 1500,
    "https://example.org/model",
    "bad\nname",
    " ",
    "日本語",
    "--help",
]


@pytest.mark.parametrize("model", NOWHERE, ids=range(len(NOWHERE)))
def test_a_missing_model_is_reported_as_not_found(load: Load, model: str) -> None:
    fault = _fault(load, model)
    assert isinstance(fault, ModelNotFound), repr(fault)
    assert fault.metadata == {"model": model}


def test_a_file_is_not_a_model(load: Load, copy: Path) -> None:
    assert isinstance(_fault(load, copy / "config.json"), ModelNotFound)


def test_an_empty_directory_is_not_a_model(load: Load, tmp_path: Path) -> None:
    fault = _fault(load, tmp_path)
    assert isinstance(fault, ModelUnsupported)
    assert "config.json" in str(fault)


def _fault(load: Load, path: Path | str) -> RunnerFault | None:
    try:
        load(path)
    except RunnerFault as fault:
        return fault.with_traceback(None)
    return None
