"""Models are computed exactly as configured, or refused with the setting named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.errors import InvalidField, ModelUnsupported
from support.logprobs import assert_logprobs_close
from support.rows import GREEDY, Row, run_rows
from tools.local_batch import LocalBatch

mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from runner_server.engine.types import TokenLogprob  # noqa: E402
from runner_server.mlx_backend.model.rotary import settle_rope  # noqa: E402 - after importorskip

Load = Callable[..., LoadedModel]
Build = Callable[..., Path]
PROMPT = [(37 * i + 11) % 500 + 1 for i in range(100)]

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


def changed(source: Path, target: Path, *drop: str, **settings: Any) -> Path:
    """Copy a model and change the configuration."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | settings
    kept = {key: value for key, value in config.items() if key not in drop}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def answer(model: LoadedModel, prompt: list[int] = PROMPT) -> list[TokenLogprob]:
    row = Row(prompt, 4, GREEDY.__class__(temperature=0, logprobs=20))
    batch = LocalBatch.of(model)
    run_rows(batch, [row])
    batch.close()
    return row.logprobs


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("type_", ["llama", "mistral", "qwen3"])
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


@pytest.mark.parametrize(
    ("type_", "named"),
    [("jamba", "normalizes the scores"), ("qwen2_moe", "norm_topk_prob"), ("gemma2", None)],
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


def test_missing_settings_are_named(load: Load, model_dir: Build, tmp_path: Path) -> None:
    path = changed(model_dir(), tmp_path / "m", "rms_norm_eps", "intermediate_size")
    with pytest.raises(ModelUnsupported, match=r"lacks intermediate_size, rms_norm_eps"):
        load(path)


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


SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}


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


def test_a_multiplier_given_as_text_is_refused_by_name(
    load: Load, model_dir: Build, tmp_path: Path
) -> None:
    path = changed(model_dir(), tmp_path / "m", attention_multiplier="0.25")
    with pytest.raises(ModelUnsupported, match=r"attention_multiplier = '0.25'"):
        load(path)


@pytest.mark.parametrize(
    "type_", ["qwen3_5", "granitemoehybrid", "olmo_hybrid", "lfm2", "gpt_neox"]
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


def test_an_unsupported_partial_rotary_factor_is_refused_by_name(
    load: Load, tmp_path: Path
) -> None:
    from tools.memory.catalog import CONFIGS
    from tools.memory.models import write_model

    path = write_model(tmp_path / "m", {**CONFIGS["ministral3"], "partial_rotary_factor": 0.5})
    with pytest.raises(ModelUnsupported, match=r"partial_rotary_factor = 0\.5"):
        load(path)


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
