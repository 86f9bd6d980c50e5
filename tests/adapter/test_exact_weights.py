"""Every stored tensor is used as stored, or the model is refused with the tensor named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.errors import ModelUnsupported
from support.changed_models import answer, changed
from support.logprobs import assert_logprobs_close

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

Load = Callable[..., LoadedModel]
Build = Callable[..., Path]


@pytest.mark.parametrize("declared", [True, None])
def test_a_separate_output_layer_is_used(
    load: Load, model_dir: Build, tmp_path: Path, declared: bool | None
) -> None:
    right = load(model_dir(tie_word_embeddings=False))
    path = changed(model_dir(tie_word_embeddings=False), tmp_path / "m", "tie_word_embeddings")
    if declared is not None:
        path = changed(path, tmp_path / "n", tie_word_embeddings=declared)
    model = load(path)
    assert_logprobs_close(answer(model), answer(right), tolerance=1e-6)
    assert any("lm_head.weight" in text for text in model.info.warnings) == (declared is True)


def add_tensor(path: Path, name: str, dtype: Any = None) -> None:
    weights = mx.load(str(path / "model.safetensors"))
    mx.eval(weights)
    weights[name] = mx.ones((4, 4)).astype(dtype or mx.float32)
    mx.save_safetensors(str(path / "model.safetensors"), weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "lm_head.weight",
    ],
)
def test_a_redundant_tensor_may_be_dropped(
    load: Load, model_dir: Build, tmp_path: Path, name: str
) -> None:
    path = changed(model_dir(), tmp_path / "m")
    if name == "lm_head.weight":
        weights = mx.load(str(path / "model.safetensors"))
        mx.eval(weights)
        weights[name] = weights["model.embed_tokens.weight"] + 0
        mx.save_safetensors(str(path / "model.safetensors"), weights)
    else:
        add_tensor(path, name)
    assert load(path).info.warnings == ()


def test_a_tensor_dropped_by_mlx_lm_is_refused_by_name(load: Load, tmp_path: Path) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    path = write_model(tmp_path / "m", CONFIGS["ernie4_5_moe"])
    load(path)
    add_tensor(path, "model.layers.1.mlp.moe_statics.e_score_correction_bias")
    with pytest.raises(ModelUnsupported, match=r"e_score_correction_bias.* would not be used"):
        load(path)


def test_8_bit_floats_that_would_be_read_as_integers_are_refused(
    load: Load, model_dir: Build, tmp_path: Path
) -> None:
    path = changed(model_dir(), tmp_path / "m")
    file = path / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__", None)
    # A quarter of the bytes: the same number of elements in an 8-bit type.
    name = "model.layers.0.mlp.up_proj.weight"
    start, _ = header[name]["data_offsets"]
    rows, columns = header[name]["shape"]
    parts = {other: entry for other, entry in header.items() if other != name}
    body = bytearray()
    for entry in parts.values():
        first, last = entry["data_offsets"]
        entry["data_offsets"] = [len(body), len(body) + last - first]
        body += data[8 + size + first : 8 + size + last]
    parts[name] = {
        "dtype": "F8_E4M3",
        "shape": [rows, columns],
        "data_offsets": [len(body), len(body) + rows * columns],
    }
    body += data[8 + size + start : 8 + size + start + rows * columns]
    text = json.dumps(parts).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + body)
    with pytest.raises(ModelUnsupported, match=r"up_proj\.weight is stored as 8-bit floats"):
        load(path)


@pytest.mark.parametrize("dtype", ["int64", "int8", "uint8", "uint32", "bool_"])
def test_integer_weights_without_scales_are_refused(
    load: Load, model_dir: Build, tmp_path: Path, dtype: str
) -> None:
    path = changed(model_dir(), tmp_path / "m")
    name = "model.layers.0.mlp.up_proj.weight"
    weights = mx.load(str(path / "model.safetensors"))
    weights[name] = (weights[name] * 100).astype(getattr(mx, dtype))
    mx.eval(weights)
    mx.save_safetensors(str(path / "model.safetensors"), weights)
    with pytest.raises(ModelUnsupported, match=rf"{name} is stored as \w+, without scales"):
        load(path)
