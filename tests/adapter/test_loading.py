"""Loading of models: architectures, dtypes, slots, limits and memory."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import Dtype, LoadSpec
from runner_server.errors import InsufficientMemory, InvalidField, ModelNotFound
from runner_server.mlx_backend import MlxBackend
from support.rows import GREEDY, Row, run_alone
from support.sweeps import diagonal

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

Build = Callable[..., Path]
Load = Callable[..., LoadedModel]

KINDS: list[dict[str, Any]] = [
    {"shape": "llama"},
    {"shape": "qwen3"},
    {"shape": "gemma3"},
    {"quantize_bits": 4, "dtype": "bfloat16"},
    {"quantize_bits": 8, "dtype": "float16"},
    {"quantize_bits": 6, "dtype": "float32"},
    {"dtype": "bfloat16"},
    {"dtype": "float16"},
    {"shards": 3},
    {"shards": 2, "quantize_bits": 4, "dtype": "bfloat16"},
]

ON_CPU = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="says what holds on a CPU"
)


@pytest.mark.parametrize(("kind", "dtype"), diagonal(KINDS, [Dtype.AUTO, Dtype.AS_STORED]))
def test_every_kind_of_model_loads_and_generates(
    load: Load, model_dir: Build, kind: dict[str, Any], dtype: Dtype
) -> None:
    path = model_dir(**kind)
    model = load(path, dtype=dtype, parallel=2)
    info = model.info
    assert (info.name, info.path) == (path.name, str(path))
    assert info.architecture in {"llama", "qwen3", "gemma3_text"}
    assert (info.vocab_size, info.context_length, info.max_context_length) == (512, 2048, 2048)
    assert info.eos_token_ids == {0}
    prompt = model.codec.encode("Hello 日本 😀", as_prompt=True)
    assert model.codec.decode(prompt) == "Hello 日本 😀"
    assert len(run_alone(model, Row(prompt, 5, GREEDY))) == 5


@ON_CPU
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_auto_on_a_cpu_is_float32(load: Load, model_dir: Build, kind: dict[str, Any]) -> None:
    info = load(model_dir(**kind)).info
    assert (info.dtype, info.quantization_bits) == ("float32", 0)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_as_stored_keeps_the_stored_dtype(
    load: Load, model_dir: Build, kind: dict[str, Any]
) -> None:
    info = load(model_dir(**kind), dtype=Dtype.AS_STORED).info
    assert info.dtype == kind.get("dtype", "float32")
    assert info.quantization_bits == kind.get("quantize_bits", 0)


@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16, Dtype.FLOAT16])
@pytest.mark.parametrize("kind", [{}, {"quantize_bits": 4, "dtype": "bfloat16"}], ids=str)
def test_a_requested_dtype_is_used(
    load: Load, model_dir: Build, dtype: Dtype, kind: dict[str, Any]
) -> None:
    info = load(model_dir(**kind), dtype=dtype).info
    assert (info.dtype, info.quantization_bits) == (dtype.value, 0)
    assert info.weight_bytes == pytest.approx(_count(model_dir()) * _size(dtype), rel=0.001)


@ON_CPU
def _limit_for_stored(load: Load, path: Path) -> int:
    """Return a limit between the memory needed as stored and as float32."""
    stored = _required(load, path, dtype=Dtype.AS_STORED, context_length=16, parallel=1)
    wide = _required(load, path, dtype=Dtype.FLOAT32, context_length=16, parallel=1)
    assert stored < wide
    return (stored + wide) // 2


def test_auto_is_refused_where_float32_does_not_fit(load: Load, model_dir: Build) -> None:
    path = model_dir(quantize_bits=4, dtype="bfloat16")
    limit = _limit_for_stored(load, path)
    with pytest.raises(InsufficientMemory):
        load(path, context_length=16, parallel=1, memory_limit_bytes=limit)


def test_auto_or_stored_keeps_the_stored_dtype_where_float32_does_not_fit(
    load: Load, model_dir: Build
) -> None:
    path = model_dir(quantize_bits=4, dtype="bfloat16")
    limit = _limit_for_stored(load, path)
    options: dict[str, Any] = {"context_length": 16, "parallel": 1, "dtype": Dtype.AUTO_OR_STORED}
    info = load(path, **options, memory_limit_bytes=limit).info
    assert (info.dtype, info.quantization_bits, info.dtype_fallback) == ("bfloat16", 4, True)
    assert info.limit_bytes <= limit
    ample = load(path, **options).info
    assert (ample.dtype, ample.quantization_bits, ample.dtype_fallback) == ("float32", 0, False)


def _required(load: Load, path: Path, **spec: Any) -> int:
    with pytest.raises(InsufficientMemory) as caught:
        load(path, memory_limit_bytes=1, **spec)
    return int(caught.value.metadata["requiredBytes"])


@pytest.mark.parametrize("bits", [3, 4, 5, 6, 8])
def test_the_size_of_dequantized_weights_is_planned_exactly(
    load: Load, model_dir: Build, bits: int
) -> None:
    path = model_dir(quantize_bits=bits, dtype="float32")
    assert load(path, dtype=Dtype.FLOAT32).info.weight_bytes == _count(model_dir()) * 4
    plain = _required(load, model_dir(), dtype=Dtype.FLOAT32)
    assert _required(load, path, dtype=Dtype.FLOAT32) == plain


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_weight_bytes_match_the_memory_held_by_mlx(
    backend: MlxBackend, load: Load, model_dir: Build, kind: dict[str, Any]
) -> None:
    path = model_dir(**kind)
    backend.release()
    before = mx.get_active_memory()
    model = load(path)
    grown = mx.get_active_memory() - before
    # Rotary frequencies and similar arrays are not counted as weights.
    assert model.info.weight_bytes <= grown <= model.info.weight_bytes + 64 * 1024
    del model
    backend.release()
    assert mx.get_active_memory() <= before + 4096
    assert mx.get_cache_memory() == 0


def test_insufficient_memory_reports_required_and_available_bytes(
    load: Load, model_dir: Build
) -> None:
    gc.collect()
    before = mx.get_active_memory()
    with pytest.raises(InsufficientMemory) as caught:
        load(model_dir(), memory_limit_bytes=100_000)
    fault = caught.value
    assert set(fault.metadata) == {"requiredBytes", "availableBytes"}
    assert fault.metadata["availableBytes"] == "100000"
    assert int(fault.metadata["requiredBytes"]) > 100_000
    assert "context_length" in str(fault)
    caught._excinfo = None  # the traceback's frames hold the lazy model
    del fault, caught
    gc.collect()
    assert mx.get_active_memory() <= before + 64 * 1024


def test_one_sequence_of_the_whole_context_must_fit(load: Load, model_dir: Build) -> None:
    path = model_dir()
    one = _required(load, path, context_length=256, parallel=1)
    # Two layers, keys and values, two heads of sixteen, float32.
    kv_per_token = 2 * 2 * 2 * 16 * 4
    assert _required(load, path, context_length=2048, parallel=1) - one >= 1792 * kv_per_token
    # With a limit, fewer sequences run together if memory is short.
    limited = load(path, context_length=256, parallel=5, memory_limit_bytes=one + 2**20).info
    assert 256 * kv_per_token <= limited.kv_budget_bytes <= 5 * 256 * kv_per_token


def test_the_parts_of_the_plan_add_up_to_the_limit(load: Load, model_dir: Build) -> None:
    path = model_dir()
    options: dict[str, Any] = {"context_length": 256, "parallel": 4}
    one = 256 * 2 * 2 * 2 * 16 * 4
    ample = load(path, **options).info
    assert ample.kv_budget_bytes == 4 * one
    assert ample.prefix_cache_bytes == one
    working = ample.limit_bytes - ample.weight_bytes - 5 * one
    assert 0 < working < 2**25
    tight = load(path, **options, memory_limit_bytes=ample.limit_bytes - one).info
    assert tight.limit_bytes == ample.limit_bytes - one
    assert (tight.kv_budget_bytes, tight.prefix_cache_bytes) == (4 * one, 0)
    with pytest.raises(InsufficientMemory, match="prefix cache"):
        load(
            path,
            **options,
            memory_limit_bytes=ample.limit_bytes,
            prefix_cache_bytes=ample.limit_bytes,
        )


def test_a_context_beyond_the_models_maximum_is_refused(load: Load, model_dir: Build) -> None:
    with pytest.raises(InvalidField) as caught:
        load(model_dir(), context_length=2049)
    assert caught.value.violations[0][0] == "context_length"
    assert load(model_dir(), context_length=2048).info.context_length == 2048


def test_a_long_context_model_gets_a_modest_default(load: Load, model_dir: Build) -> None:
    info = load(model_dir(max_position_embeddings=100_000)).info
    assert (info.context_length, info.max_context_length) == (4096, 100_000)


def test_progress_rises_to_100(backend: MlxBackend, model_dir: Build) -> None:
    seen: list[int] = []
    backend.load(LoadSpec(str(model_dir("qwen3"))), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 100
    assert len(set(seen)) > 10


@pytest.mark.parametrize("at", [0, 5, 50])
def test_a_load_aborted_by_its_progress_report_frees_its_memory(
    backend: MlxBackend, model_dir: Build, at: int
) -> None:
    class StoppedError(Exception):
        pass

    def report(progress: int) -> None:
        if progress >= at:
            raise StoppedError

    path = model_dir("llama", hidden_size=256, intermediate_size=512)
    backend.release()
    before = mx.get_active_memory()
    with pytest.raises(StoppedError):
        backend.load(LoadSpec(str(path)), report)
    backend.release()
    assert mx.get_active_memory() <= before + 4096


def _hub(cache: Path, name: str, model: Path) -> None:
    """Place a model in a Hugging Face cache as huggingface_hub would."""
    folder = cache / f"models--{name.replace('/', '--')}"
    commit = "0" * 40
    snapshot = folder / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(model, target_is_directory=True)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)


def test_a_hub_id_is_loaded_from_the_local_cache(
    load: Load, model_dir: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hub(tmp_path, "org/some-model", model_dir())
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    info = load("org/some-model").info
    assert info.name == "org/some-model"
    assert Path(info.path).resolve() == model_dir().resolve()
    with pytest.raises(ModelNotFound) as caught:
        load("org/other")
    assert caught.value.metadata == {"model": "org/other"}


def _count(path: Path) -> int:
    """Return the number of weights in a float32 model, from the file header."""
    data = (path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return int(max(ends)) // 4


def _size(dtype: Dtype) -> int:
    return 4 if dtype is Dtype.FLOAT32 else 2
