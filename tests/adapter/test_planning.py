"""The plan of a load, made before weights are read."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_common.cores import Cores  # noqa: E402
from runner_server.engine.backend import LoadedModel  # noqa: E402
from runner_server.engine.types import Dtype, LoadSpec, Sampling  # noqa: E402
from runner_server.mlx_backend import MlxBackend  # noqa: E402
from runner_server.mlx_backend.loading.loader import plan_load  # noqa: E402
from runner_server.mlx_backend.planning.measure import constraint_bytes, process_bytes  # noqa: E402
from runner_server.mlx_backend.planning.tokenizer_memory import tokenizer_memory  # noqa: E402
from support.rows import GREEDY, Row, run_rows  # noqa: E402
from tools.local_batch import LocalBatch  # noqa: E402
from tools.memory.models import scaled, write_model  # noqa: E402

Load = Callable[..., LoadedModel]
Build = Callable[..., Path]
MIB = 1 << 20


def test_a_plan_reads_no_weights(model_dir: Build) -> None:
    path = model_dir(hidden_size=256, intermediate_size=2048)
    before = mx.get_active_memory()
    plan = plan_load(path, LoadSpec(str(path), parallel=8, context_length=1024))
    assert mx.get_active_memory() - before < 64 * 1024
    assert plan.need.total_bytes == sum(plan.need.parts.values())
    assert plan.limit_bytes == plan.need.mlx_bytes


def test_a_plan_matches_the_load(load: Load, model_dir: Build) -> None:
    path = model_dir(quantize_bits=4, dtype="bfloat16")
    for dtype in (Dtype.AUTO, Dtype.AS_STORED):
        plan = plan_load(path, LoadSpec(str(path), parallel=2, dtype=dtype))
        info = load(path, parallel=2, dtype=dtype).info
        assert info.weight_bytes == plan.need.weight_bytes
        assert (info.limit_bytes, info.reserved_bytes) == (
            plan.limit_bytes,
            plan.need.total_bytes,
        )


def test_weights_stored_in_the_target_dtype_need_no_extra_memory_to_load(model_dir: Build) -> None:
    plain = plan_load(model_dir(), LoadSpec(str(model_dir()), parallel=1, context_length=16))
    assert plain.need.load_transient_bytes == 0


@pytest.mark.parametrize("model_type", ["mamba2", "granitemoehybrid", "qwen3_next", "falcon_h1"])
def test_recurrent_states_are_counted(tmp_path: Path, model_type: str) -> None:
    path = write_model(tmp_path, scaled(model_type))
    four = plan_load(path, LoadSpec(str(path), parallel=4, context_length=64))
    eight = plan_load(path, LoadSpec(str(path), parallel=8, context_length=64))
    assert eight.need.kv_bytes == 2 * four.need.kv_bytes > 0


@pytest.mark.parametrize("model_type", ["gemma2", "internlm3", "llama4"])
def test_a_model_that_cannot_batch_is_planned_for_one_sequence(
    tmp_path: Path, model_type: str
) -> None:
    path = write_model(tmp_path, scaled(model_type))
    several = plan_load(path, LoadSpec(str(path), parallel=4))
    assert several.parallel == 1
    assert any("one after another" in text and model_type in text for text in several.warnings)
    one = plan_load(path, LoadSpec(str(path), parallel=1))
    assert several.need == one.need
    assert one.warnings == ()


def test_layers_without_attention_work_with_batch_and_prefix_cache(
    tmp_path: Path, load: Load
) -> None:
    """Empty caches of such layers once made the prefix cache and the batch fail repeatedly."""
    path = write_model(tmp_path, scaled("nemotron-nas"))
    prompts = [[1 + i % 200 for i in range(40 + 3 * row)] for row in range(3)]
    alone = [
        run_rows(LocalBatch.of(load(path, parallel=1, prefix_cache_bytes=0)), [Row(prompt, 8)])[0]
        for prompt in prompts
    ]
    model = load(path, parallel=4, prefix_cache_bytes=8 * MIB)
    for _ in range(2):
        together = run_rows(LocalBatch.of(model), [Row(prompt, 8) for prompt in prompts])
        assert together == alone


def test_the_costliest_options_stay_within_the_limit(load: Load, model_dir: Build) -> None:
    path = model_dir("qwen3", vocab_size=50_000)
    model = load(path, parallel=8, context_length=64, prefix_cache_bytes=0)
    costly = Sampling(
        top_k=49_999,
        top_p=0.9,
        repeat_penalty=1.2,
        presence_penalty=0.5,
        logit_bias=((1, 2.0),),
        logprobs=20,
    )
    mx.clear_cache()
    # Other models of this session do not count towards the limit.
    others = mx.get_active_memory() - model.info.weight_bytes
    usual = mx.set_memory_limit(others + model.info.limit_bytes)
    mx.reset_peak_memory()
    try:
        run_rows(LocalBatch.of(model), [Row([1, 2, 3 + row], 10, costly) for row in range(8)])
    finally:
        mx.set_memory_limit(usual)
    assert mx.get_peak_memory() - others <= model.info.limit_bytes


def test_an_unloaded_model_leaves_no_modules(tmp_path: Path) -> None:
    path = write_model(tmp_path, scaled("phi3"))
    sys.modules.pop("mlx_lm.models.phi3", None)
    backend = MlxBackend()
    backend.open()
    backend.load(LoadSpec(str(path)), lambda _progress: None)
    assert "mlx_lm.models.phi3" in sys.modules
    backend.release()
    assert "mlx_lm.models.phi3" not in sys.modules
    again = backend.load(LoadSpec(str(path)), lambda _progress: None)
    assert run_rows(LocalBatch.of(again), [Row([1, 2], 3, GREEDY)])


@pytest.mark.parametrize("kind", ["BPE", "merges of old", "Unigram"])
def test_tokenizer_memory_is_estimated_per_vocabulary_entry(tmp_path: Path, kind: str) -> None:
    words = [f"w{i}" for i in range(30_000)]
    merges: list[Any] = [["w", word] for word in words]
    models: dict[str, dict[str, Any]] = {
        "BPE": {"vocab": {word: i for i, word in enumerate(words)}, "merges": merges},
        "merges of old": {
            "vocab": {word: i for i, word in enumerate(words)},
            "merges": [" ".join(pair) for pair in merges],
        },
        "Unigram": {"vocab": [[word, -1.5] for word in words]},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": models[kind]}))
    memory = tokenizer_memory(tmp_path)
    assert memory.held_bytes == pytest.approx(30_000 * 400, rel=0.01)
    texts = {"BPE": 90_000, "merges of old": 60_000, "Unigram": 30_000}[kind]
    assert memory.peak_bytes == pytest.approx(max(texts * 300, 30_000 * 400), rel=0.01)


def test_a_type_known_not_to_batch_is_planned_for_one_sequence(tmp_path: Path) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    path = write_model(tmp_path, CONFIGS["afm7"])
    assert plan_load(path, LoadSpec(str(path), parallel=8)).parallel == 1


@pytest.mark.parametrize(
    ("imported", "more_mib"), [((), 0), (("numpy",), 12), (("numpy", "transformers"), 75)]
)
def test_packages_that_a_model_imports_are_counted(
    imported: tuple[str, ...], more_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "transformers"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    without = process_bytes(8, "cpu")
    for name in imported:
        monkeypatch.setitem(sys.modules, name, sys)
    assert process_bytes(8, "cpu") == without + more_mib * MIB


def test_constraints_are_counted_if_they_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert constraint_bytes(1000) == 8 * MIB + 400_000
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert constraint_bytes(1000) == 0


def test_mkl_is_counted_with_buffers_for_each_core(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = "runner_server.mlx_backend.planning.measure"
    without = process_bytes(8, "gpu")
    monkeypatch.setattr(
        f"{measured}.blas_of", lambda device: {"cpu": "MKL (libmkl_rt.so.3)"}.get(device, "")
    )
    monkeypatch.setattr(f"{measured}.usable_cores", lambda: Cores(16, 32))
    assert process_bytes(8, "cpu") == without + (32 + 16 * 2) * MIB
    assert process_bytes(8, "gpu") == without


def test_the_process_of_chat_templates_is_counted_if_there_is_a_template(
    model_dir: Build, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(model_dir(), tmp_path / "model"))
    without = plan_load(path, LoadSpec(str(path))).need.process_bytes
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert plan_load(path, LoadSpec(str(path))).need.process_bytes == without + 20 * MIB
