"""Casting of weights to other dtypes, and the weights exempt from casting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.types import Dtype, LoadSpec
from support.rows import Row, run_alone, run_rows
from support.sweeps import diagonal
from tools.local_batch import LocalBatch
from tools.memory.models import scaled, write_model

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from mlx.utils import tree_flatten  # noqa: E402

from runner_server.mlx_backend.loading.loader import plan_load  # noqa: E402

Load = Callable[..., LoadedModel]

ON_CPU = pytest.mark.skipif(
    mx.default_device() != mx.Device(mx.cpu), reason="a GPU multiplies experts in 16 bits"
)
ROWS = [Row([5, 6, 7 + row], 6) for row in range(3)]


def _formats(model: LoadedModel) -> dict[str, str]:
    inner: Any = model
    named: Any = tree_flatten(inner._model.parameters())
    return {name: str(value.dtype).removeprefix("mlx.core.") for name, value in named}


@ON_CPU
@pytest.mark.parametrize(
    ("stored", "model_type"),
    diagonal(["float16", "bfloat16"], ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"]),
)
def test_16_bit_experts_are_held_as_float32_on_a_cpu(
    tmp_path: Path, load: Load, model_type: str, stored: str
) -> None:
    path = write_model(tmp_path, scaled(model_type), dtype=stored)
    plan = plan_load(path, LoadSpec(str(path), dtype=Dtype.AS_STORED, parallel=4))
    model = load(path, dtype=Dtype.AS_STORED, parallel=4)
    assert any("experts are held as float32" in text for text in model.info.warnings)
    assert plan.warnings == model.info.warnings
    assert model.info.weight_bytes == plan.need.weight_bytes
    assert set(_formats(model).values()) == {stored, "float32"}
    together = run_rows(LocalBatch.of(model), [Row(row.prompt, row.count) for row in ROWS])
    assert [len(ids) for ids in together] == [6, 6, 6]


def test_float32_experts_need_no_special_case(tmp_path: Path, load: Load) -> None:
    path = write_model(tmp_path, scaled("qwen3_moe"), dtype="bfloat16")
    model = load(path)
    assert model.info.warnings == ()
    assert set(_formats(model).values()) == {"float32"}
    assert len(run_alone(model, ROWS[0])) == 6


@pytest.mark.parametrize("dtype", [Dtype.BFLOAT16, Dtype.FLOAT16])
def test_precision_sensitive_weights_are_not_cast(tmp_path: Path, load: Load, dtype: Dtype) -> None:
    """With 8 bits of precision, router biases would select other experts."""
    path = write_model(tmp_path, scaled("glm4_moe"))
    model = load(path, dtype=dtype)
    formats = _formats(model)
    wide = [name for name in formats if "e_score_correction_bias" in name]
    assert wide
    assert {formats[name] for name in wide} == {"float32"}
    assert formats["model.embed_tokens.weight"] == dtype.value
    assert len(run_alone(model, ROWS[0])) == 6


def test_precision_sensitive_weights_keep_the_stored_dtype(tmp_path: Path, load: Load) -> None:
    path = write_model(tmp_path, scaled("qwen3_next"), dtype="bfloat16")
    stored = _formats(load(path, dtype=Dtype.AS_STORED))
    cast = _formats(load(path, dtype=Dtype.BFLOAT16))
    assert cast == stored
