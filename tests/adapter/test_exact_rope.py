"""Rotary embeddings are computed exactly as configured, or refused with the setting named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.errors import InvalidField, ModelUnsupported
from support.changed_models import SLIDING, answer, changed
from support.logprobs import assert_logprobs_close
from support.sweeps import diagonal, sampled

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.mlx_backend.model.rotary import settle_rope

Load = Callable[..., LoadedModel]
Build = Callable[..., Path]

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 5e5, "factor": 4.0},
}


@pytest.mark.parametrize(("type_", "kind"), diagonal(["llama", "mistral", "qwen3"], [*ROPES]))
def test_rope_parameters_have_the_same_effect_as_the_older_names(
    load: Load, model_dir: Build, tmp_path: Path, type_: str, kind: str
) -> None:
    source, rope = model_dir("qwen3" if type_ == "qwen3" else "llama"), ROPES[kind]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    older = {"rope_theta": 5e5, "rope_scaling": None if kind == "default" else scaling}
    old = changed(source, tmp_path / "old", model_type=type_, **older)
    new = changed(source, tmp_path / "new", "rope_theta", model_type=type_, rope_parameters=rope)
    right = answer(load(old))
    assert_logprobs_close(answer(load(new)), right, tolerance=1e-6)
    plain = answer(load(changed(source, tmp_path / "plain", model_type=type_)))
    assert abs(plain[0].logprob - right[0].logprob) > 1e-3


LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 2.0 * i for i in range(8)],
    "original_max_position_embeddings": 128,
}


def rope_of(model: LoadedModel) -> Any:
    inner: Any = model
    return inner._model.model.layers[0].self_attn.rope


def test_short_contexts_use_the_short_rope_factors(
    load: Load, model_dir: Build, tmp_path: Path
) -> None:
    path = changed(model_dir(), tmp_path / "m", rope_scaling=LONG, max_position_embeddings=256)
    model = load(path)
    assert model.info.context_length == 128
    wavelengths = [10_000.0 ** (2 * i / 16) for i in range(8)]
    short = [f * w for f, w in zip(LONG["short_factor"], wavelengths, strict=True)]
    assert rope_of(model)._freqs.tolist() == pytest.approx(short, rel=1e-6)
    long = [f * w for f, w in zip(LONG["long_factor"], wavelengths, strict=True)]
    with pytest.raises(InvalidField):
        load(path, context_length=256)
    longer = load(path, context_length=256, allow_inexact=True)
    assert rope_of(longer)._freqs.tolist() == pytest.approx(long, rel=1e-6)


def yarn_frequencies(scaling: Mapping[str, Any], base: float, dims: int) -> list[float]:
    """Reimplement ``_compute_yarn_parameters`` of transformers, as wavelengths over 2 pi."""

    def dimension(rotations: float) -> float:
        original = scaling["original_max_position_embeddings"]
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(32), dimension(1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    found = []
    for i in range(dims // 2):
        ramp = min(1.0, max(0.0, (i - low) / (high - low)))
        plain = base ** (-2 * i / dims)
        found.append(1 / (plain / scaling["factor"] * ramp + plain * (1 - ramp)))
    return found


@pytest.mark.parametrize("truncate", [True, False, None])
@pytest.mark.parametrize("attention_factor", [1.3, None])
def test_yarn_uses_all_of_its_settings(
    load: Load, model_dir: Build, tmp_path: Path, truncate: bool | None, attention_factor: float
) -> None:
    scaling = {**ROPES["yarn"], "original_max_position_embeddings": 256, "truncate": truncate}
    rope = {key: value for key, value in scaling.items() if value is not None}
    rope["attention_factor"] = attention_factor
    model = load(changed(model_dir(), tmp_path / "m", rope_parameters=rope))
    found = rope_of(model)
    assert found._freqs.tolist() == pytest.approx(yarn_frequencies(rope, 5e5, 16), rel=1e-5)
    assert found.mscale == pytest.approx(attention_factor or 0.1 * math.log(4) + 1)


def test_rope_is_unchanged_without_scaling(load: Load, model_dir: Build) -> None:
    model: Any = load(model_dir())
    settle_rope(model._model, {"rope_scaling": None, "head_dim": 16}, frozenset(), 100)
    assert (rope_of(model).dims, rope_of(model).scale) == (16, 1.0)


@pytest.mark.parametrize(
    ("rope", "settings", "named"),
    [
        ({"chunked_attention": ROPES["default"]}, {}, "rope_parameters.chunked_attention"),
        (
            {"full_attention": ROPES["default"], "sliding_attention": ROPES["linear"]},
            SLIDING,
            "rope_parameters.sliding_attention",
        ),
        (
            {"full_attention": ROPES["default"], "sliding_attention": ROPES["linear"]},
            {"layer_types": ["full_attention"] * 2},
            None,
        ),
    ],
)
def test_rope_parameters_per_attention_kind_are_used_or_refused_by_name(
    load: Load,
    model_dir: Build,
    tmp_path: Path,
    rope: dict[str, Any],
    settings: dict[str, Any],
    named: str | None,
) -> None:
    path = changed(model_dir(), tmp_path / "m", rope_parameters=rope, **settings)
    if named is None:
        load(path)
        return
    with pytest.raises(ModelUnsupported, match=named):
        load(path)


@pytest.mark.parametrize(
    "type_",
    sampled(
        ["qwen3_5", "granitemoehybrid", "olmo_hybrid", "lfm2", "gpt_neox"],
        ["qwen3_5", "gpt_neox"],
    ),
)
def test_types_with_only_the_newer_rope_name_follow_the_older_ones(
    load: Load, tmp_path: Path, type_: str
) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    config = CONFIGS[type_]
    part = config.get("text_config", config)
    dropped = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_emb_base")
    kept = {key: value for key, value in part.items() if key not in dropped}
    answers = []
    for rope in ({"rope_theta": 5e5}, {"rope_parameters": ROPES["default"]}, {"rope_theta": 2e4}):
        text = {**kept, **rope}
        whole = {**config, "text_config": text} if part is not config else text
        path = write_model(tmp_path / "built", config)
        (path / "config.json").write_text(json.dumps(whole))
        answers.append(answer(load(path), [i % 40 + 1 for i in range(60)]))
    assert_logprobs_close(answers[0], answers[1], tolerance=1e-6)
    assert answers[0][0].logprob != answers[2][0].logprob


@pytest.mark.parametrize(
    ("type_", "rope"),
    [
        ("mixtral", {"rope_type": "made_up", "factor": 4.0}),
        ("lfm2", ROPES["yarn"]),
        ("granitemoehybrid", ROPES["linear"]),
        ("olmo_hybrid", ROPES["llama3"]),
    ],
)
def test_rope_scaling_unsupported_by_a_class_is_refused(
    load: Load, tmp_path: Path, type_: str, rope: dict[str, Any]
) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    path = write_model(tmp_path / "m", {**CONFIGS[type_], "rope_parameters": rope})
    with pytest.raises(ModelUnsupported, match=r"rope_scaling = .* has no effect"):
        load(path)


def test_a_type_with_rope_parameters_per_kind_is_refused_without_kinds(
    load: Load, tmp_path: Path
) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    path = write_model(tmp_path / "m", CONFIGS["laguna"])
    load(path)
    names = ("rope_parameters", "rope_theta", "rope_scaling")
    for name, value in zip(names, (ROPES["default"], 5e5, ROPES["yarn"]), strict=True):
        other = changed(path, tmp_path / name, *(set(names) - {name}), **{name: value})
        with pytest.raises(ModelUnsupported, match=f"{name} = .* names no kind of attention"):
            load(other)


def test_an_unsupported_partial_rotary_factor_is_refused_by_name(
    load: Load, tmp_path: Path
) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    path = write_model(tmp_path / "m", {**CONFIGS["ministral3"], "partial_rotary_factor": 0.5})
    with pytest.raises(ModelUnsupported, match=r"partial_rotary_factor = 0\.5"):
        load(path)


@pytest.mark.parametrize("type_", ["laguna", "mellum", "spark2_5", "glm4", "gemma4_text", "phi"])
def test_rotary_embeddings_with_a_share_set_by_the_class_are_unchanged(
    load: Load, tmp_path: Path, type_: str
) -> None:
    """Sliding layers of these types rotate whole heads, or a different share."""
    from mlx_lm.utils import load_model

    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    def sizes(model: Any) -> list[tuple[str, Any]]:
        ropes = [each for each in model.modules() if "rope" in type(each).__name__.lower()]
        return [(type(rope).__name__, rope.dims) for rope in ropes]

    path = write_model(tmp_path, CONFIGS[type_])
    found: Any = load(path, allow_inexact=True)
    assert sizes(found._model) == sizes(load_model(path, lazy=True)[0])
