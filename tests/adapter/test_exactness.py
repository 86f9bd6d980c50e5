"""Models are computed exactly as configured, or refused with the setting named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.errors import InvalidField, ModelUnsupported
from support.changed_models import SLIDING, answer, changed

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

Load = Callable[..., LoadedModel]
Build = Callable[..., Path]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"hidden_act": "made_up"}, "hidden_act = 'made_up'"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"residual_multiplier": 0.2}, "residual_multiplier"),
        ({"query_pre_attn_scalar": 17}, "query_pre_attn_scalar"),
    ],
)
def test_an_unsupported_setting_is_refused_by_name(
    load: Load, model_dir: Build, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    path = changed(model_dir(), tmp_path / "m", **settings)
    with pytest.raises(ModelUnsupported, match=named) as caught:
        load(path)
    assert caught.value.metadata == {"model": str(path)}
    warnings = load(path, allow_inexact=True).info.warnings
    assert any(named in warning for warning in warnings)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_act": "silu"},
        {"hidden_act": "swish"},
        {"final_logit_softcapping": None},
        {"logits_scaling": 1.0},
        {"query_pre_attn_scalar": 16},
        {"sliding_window": None},
        {"sliding_window": 16, "use_sliding_window": False},
        {"sliding_window": 4096},
        {"attention_dropout": 0.1, "initializer_range": 0.02, "pretraining_tp": 1},
    ],
)
def test_a_neutral_value_causes_no_warning(
    load: Load, model_dir: Build, tmp_path: Path, settings: dict[str, Any]
) -> None:
    assert load(changed(model_dir(), tmp_path / "m", **settings)).info.warnings == ()


def test_an_unsupported_window_limits_the_context(
    load: Load, model_dir: Build, tmp_path: Path
) -> None:
    path = changed(model_dir(), tmp_path / "m", model_type="mistral", sliding_window=64)
    info = load(path).info
    assert info.context_length == 64
    assert info.max_context_length == 2048
    assert any("sliding_window = 64" in warning for warning in info.warnings)
    with pytest.raises(InvalidField) as caught:
        load(path, context_length=65)
    ((field, text),) = caught.value.violations
    assert field == "context_length"
    assert "sliding_window = 64" in text
    longer = load(path, context_length=65, allow_inexact=True).info
    assert longer.context_length == 65
    assert any("more than 64 tokens" in warning for warning in longer.warnings)


def test_windows_of_listed_layers_are_used(load: Load, model_dir: Build, tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention"]
    path = changed(model_dir(), tmp_path / "m", layer_types=kinds, sliding_window=16)
    model = load(path)
    assert (model.info.context_length, model.info.warnings) == (2048, ())


@pytest.mark.parametrize(
    ("type_", "named"),
    [
        ("jamba", "normalizes the scores"),
        ("qwen2_moe", "norm_topk_prob"),
        ("phi3small", "attend to later ones"),
        ("gemma2", None),
    ],
)
def test_a_type_computed_differently_by_mlx_lm_is_refused(
    load: Load, tmp_path: Path, type_: str, named: str | None
) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    path = write_model(tmp_path / "m", CONFIGS[type_])
    if named is None:
        load(path)
        return
    with pytest.raises(ModelUnsupported, match=named):
        load(path)
    assert any(named in text for text in load(path, allow_inexact=True).info.warnings)


@pytest.mark.parametrize(("named", "computed"), [("gelu", "gelu_pytorch_tanh")])
def test_the_configured_kind_of_gelu_is_computed(
    load: Load, tmp_path: Path, named: str, computed: str
) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    answers: dict[str, float] = {}
    for name in (named, computed, named):
        config = {**CONFIGS["starcoder2"], "hidden_act": name}
        path = write_model(tmp_path / f"m{len(answers)}", config)
        found = answer(load(path), [1, 2, 3, 4, 5])[0].logprob
        assert answers.setdefault(name, found) == found
    assert answers[named] != answers[computed]


def test_missing_settings_are_named(load: Load, model_dir: Build, tmp_path: Path) -> None:
    path = changed(model_dir(), tmp_path / "m", "rms_norm_eps", "intermediate_size")
    with pytest.raises(ModelUnsupported, match=r"lacks intermediate_size, rms_norm_eps"):
        load(path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "layer_types has 'linear_atte"),
        ({"layer_types": SLIDING["layer_types"]}, "config.json has no sliding_window"),
    ],
)
def test_layer_kinds_unknown_to_a_class_are_refused_by_name(
    load: Load, model_dir: Build, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(ModelUnsupported, match=named):
        load(changed(model_dir(), tmp_path / "m", **settings))


@pytest.mark.parametrize(("first", "longest"), [(0, 64), (1, 64), (2, 2048), (None, 2048)])
def test_sliding_windows_begin_at_max_window_layers(
    load: Load, model_dir: Build, tmp_path: Path, first: int | None, longest: int
) -> None:
    settings = {"use_sliding_window": True, "sliding_window": 64}
    if first is not None:
        settings["max_window_layers"] = first
    path = changed(model_dir("qwen3"), tmp_path / "m", **settings)
    assert load(path).info.context_length == longest


def test_a_multiplier_given_as_text_is_refused_by_name(
    load: Load, model_dir: Build, tmp_path: Path
) -> None:
    path = changed(model_dir(), tmp_path / "m", attention_multiplier="0.25")
    with pytest.raises(ModelUnsupported, match=r"attention_multiplier = '0.25'"):
        load(path)


@pytest.mark.parametrize("type_", ["cohere2", "gemma3_text"])
def test_irregular_layer_kinds_are_refused_where_a_class_assumes_a_period(
    load: Load, tmp_path: Path, type_: str
) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    count = CONFIGS[type_]["num_hidden_layers"]
    kinds = ["sliding_attention", "full_attention"] * count
    path = write_model(tmp_path / "m", CONFIGS[type_])
    load(changed(path, tmp_path / "n", layer_types=kinds[:count]))
    odd = changed(path, tmp_path / "o", layer_types=[*kinds[: count - 1], "full_attention"][::-1])
    with pytest.raises(ModelUnsupported, match=r"layer_types .* every Nth layer"):
        load(odd)


@pytest.mark.parametrize(
    ("type_", "settings", "named"),
    [
        ("nemotron", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("nemotron", {"hidden_act": "relu2"}, None),
    ],
)
def test_an_activation_unknown_to_a_class_is_refused_by_name(
    load: Load, tmp_path: Path, type_: str, settings: dict[str, Any], named: str | None
) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    path = write_model(tmp_path / "m", {**CONFIGS[type_], **settings})
    if named is None:
        load(path)
        return
    with pytest.raises(ModelUnsupported, match=named):
        load(path)


def test_a_setting_that_would_crash_the_process_is_never_allowed(
    load: Load, tmp_path: Path
) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    path = write_model(tmp_path, {**CONFIGS["bailing_moe"], "num_experts_per_tok": 1})
    with pytest.raises(ModelUnsupported, match="one expert per token"):
        load(path, allow_inexact=True)
