"""Configurations of different transformers releases, read into one form."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from runner_common.model_directory import (
    Configuration,
    ModelUnusableError,
    read_model_directory,
)
from support.safetensors_files import Shapes, write_model

PLAIN: dict[str, Any] = {"model_type": "llama", "max_position_embeddings": 64}
EMBEDDINGS: Shapes = {"model.embed_tokens.weight": ("F32", (4, 2))}
HEAD: Shapes = {"lm_head.weight": ("F32", (4, 2))}


def read(path: Path, config: dict[str, Any], shapes: Shapes = EMBEDDINGS) -> Configuration:
    return read_model_directory(write_model(path, shapes, {**PLAIN, **config})).configuration


@pytest.mark.parametrize("section", [None, "text_config"])
@pytest.mark.parametrize("kind", ["default", "llama3", "yarn", "linear"])
def test_rope_parameters_are_copied_to_the_older_names(
    tmp_path: Path, kind: str, section: str | None
) -> None:
    rope = {"rope_type": kind, "rope_theta": 5e5, "factor": 4.0, "beta_fast": None}
    if kind == "default":
        rope = {"rope_type": kind, "rope_theta": 5e5}
    config: dict[str, Any] = {"rope_parameters": rope}
    values = read(tmp_path, {section: config} if section else config).values
    part = values[section] if section else values
    assert part["rope_theta"] == 5e5
    if kind == "default":
        assert not part.get("rope_scaling")
    else:
        scaling = part["rope_scaling"]
        assert (scaling["type"], scaling["rope_type"], scaling["factor"]) == (kind, kind, 4.0)
        assert "beta_fast" not in scaling


def test_rope_parameters_per_attention_kind_are_copied_to_the_older_names(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    values = read(tmp_path, {"rope_parameters": rope}).values
    assert (values["rope_theta"], values["rope_local_base_freq"]) == (1e6, 1e4)
    assert values["rope_scaling"]["factor"] == 8.0


@pytest.mark.parametrize(
    ("scaling", "longest"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32}, 64),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 64),
        ({"rope_type": "default"}, 64),
        (None, 64),
    ],
)
def test_rope_scaling_determines_the_context_length(
    tmp_path: Path, scaling: dict[str, Any] | None, longest: int
) -> None:
    assert read(tmp_path, {"rope_scaling": scaling}).context_length == longest


def test_the_context_of_gemma_already_includes_the_factor(tmp_path: Path) -> None:
    text = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "model_type": "gemma3_text"}
    assert read(tmp_path, {"model_type": "gemma3", "text_config": text}).context_length == 64


@pytest.mark.parametrize("declared", [True, False, None])
@pytest.mark.parametrize("in_text", [True, False])
def test_an_output_layer_different_from_the_embeddings_is_used(
    tmp_path: Path, declared: bool | None, in_text: bool
) -> None:
    tied = {} if declared is None else {"tie_word_embeddings": declared}
    config: dict[str, Any] = {"text_config": tied} if in_text else tied
    path = write_model(tmp_path, {**EMBEDDINGS, **HEAD}, {**PLAIN, **config})
    with (path / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    found = read_model_directory(path)
    values = found.configuration.values
    assert not (values["text_config"] if in_text else values)["tie_word_embeddings"]
    assert any("lm_head.weight" in note for note in found.notes) == (declared is True)


@pytest.mark.parametrize("shapes", [EMBEDDINGS, {**EMBEDDINGS, **HEAD}])
def test_an_output_layer_equal_to_the_embeddings_is_tied(tmp_path: Path, shapes: Shapes) -> None:
    assert read(tmp_path, {}, shapes).values["tie_word_embeddings"] is True
    assert (
        read(tmp_path, {"tie_word_embeddings": False}, shapes).values["tie_word_embeddings"]
        is False
    )


def test_end_of_text_ids_are_merged_from_all_files(tmp_path: Path) -> None:
    config = {"eos_token_id": 1, "text_config": {"eos_token_id": [2, 3]}}
    path = write_model(tmp_path, EMBEDDINGS, {**PLAIN, **config})
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    found = read_model_directory(path).configuration
    assert found.eos_token_ids == {1, 2, 3, 4}
    assert found.values["eos_token_id"] == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [True, "</s>", 1.5, -1, 2**40, [2, "x"], [[2]], {"a": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_invalid_token_id_is_refused_by_name(tmp_path: Path, file: str, value: object) -> None:
    wrong = {"eos_token_id": value}
    path = write_model(tmp_path, EMBEDDINGS, {**PLAIN, **(wrong if file[0] == "c" else {})})
    if file[0] == "g":
        (path / file).write_text(json.dumps(wrong))
    with pytest.raises(ModelUnusableError, match=rf"{file}: eos_token_id has "):
        read_model_directory(path)


@pytest.mark.parametrize("content", [b"[1]", b"null", b"{", b'{"a": "\xff"}', b"[" * 100_000])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_file_without_a_json_object_is_refused_by_name(
    tmp_path: Path, file: str, content: bytes
) -> None:
    path = write_model(tmp_path, EMBEDDINGS, PLAIN)
    (path / file).write_bytes(content)
    with pytest.raises(ModelUnusableError, match=file):
        read_model_directory(path)


def test_a_byte_order_mark_and_tagged_numbers_are_read(tmp_path: Path) -> None:
    path = write_model(tmp_path, EMBEDDINGS, PLAIN)
    text = json.dumps({**PLAIN, "limit": {"__float__": "Infinity"}})
    (path / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_model_directory(path).configuration.values["limit"] == math.inf


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": None}, "model_type"),
        ({"model_type": "../x"}, "model_type"),
        ({"model_file": "x.py"}, "never runs code"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"text_config": {"n_layer": -1}}, "layers"),
        ({"max_position_embeddings": "64"}, "context"),
        ({"max_position_embeddings": True}, "context"),
    ],
)
def test_an_impossible_setting_is_refused(
    tmp_path: Path, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelUnusableError, match=rf"config\.json: .*{says}"):
        read(tmp_path, config)


def test_a_missing_configuration_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusableError, match=r"no config\.json in"):
        read_model_directory(tmp_path)


def test_quantization_is_read_from_a_modelopt_file(tmp_path: Path) -> None:
    path = write_model(tmp_path, EMBEDDINGS, PLAIN)
    (path / "hf_quant_config.json").write_bytes(b'\xef\xbb\xbf{"quant_method": "modelopt"}')
    values = read_model_directory(path).configuration.values
    assert values["quantization_config"] == {"quant_method": "modelopt"}


@pytest.mark.parametrize(
    ("config", "filled"),
    [
        ({"num_local_experts": 8}, {"num_experts": 8}),
        ({"n_positions": 64}, {"n_ctx": 64}),
        ({"hidden_size": 64, "num_attention_heads": 4}, {"head_dim": 16}),
        ({"layer_types": ["sliding_attention", "full_attention"]}, {"sliding_window_pattern": 2}),
        (
            {
                "layer_types": ["sliding_attention", "full_attention"],
                "sliding_window_pattern": 4,
            },
            {"sliding_window_pattern": 2},
        ),
        ({"layer_types": ["sliding_attention"] * 2}, {"sliding_window_pattern": 3}),
        ({"layer_types": ["full_attention"] * 2}, {"sliding_window_pattern": 1}),
        (
            {"model_type": "exaone4", "layer_types": ["full_attention"]},
            {"sliding_window_pattern": None},
        ),
        (
            {"model_type": "granitemoehybrid", "layer_types": ["linear_attention"]},
            {"layer_types": ["mamba"]},
        ),
    ],
)
def test_settings_are_copied_to_all_of_their_names(
    tmp_path: Path, config: dict[str, Any], filled: dict[str, Any]
) -> None:
    values = read(tmp_path, config).values
    assert {key: values[key] for key in filled} == filled
    assert read(tmp_path / "text", {"text_config": config}).values["text_config"].items() >= (
        filled.items()
    )


@pytest.mark.parametrize("section", [None, "text_config"])
@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0"),
        ({"vocab_size": [1, "x"]}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": True}, "num_key_value_heads is True"),
        ({"head_dim": -3}, "head_dim is -3"),
        ({"num_experts_per_tok": -1}, "num_experts_per_tok is -1"),
        ({"intermediate_size": 10**30}, "intermediate_size"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan"),
        ({"layer_norm_eps": "1e-5"}, "layer_norm_eps"),
        ({"logit_scale": math.nan}, "logit_scale is NaN"),
        ({"layer_types": [["full_attention"]]}, "layer_types"),
        ({"layer_types": {"a": 1}}, "layer_types"),
        ({"sliding_window": "16"}, "sliding_window is '16'"),
        ({"sliding_window": 16.0}, "sliding_window is 16.0"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"use_sliding_window": "false"}, "use_sliding_window is 'false'"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'"),
        ({"quantization": [4]}, "quantization is"),
        ({"quantization": {"bits": "4"}}, "quantization.bits is '4'"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor is 0"),
        ({"partial_rotary_factor": "0.5"}, "partial_rotary_factor is '0.5'"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": -1e4}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling.factor is '4'"),
        ({"rope_scaling": {"type": "linear", "factor": -2.0}}, "rope_scaling.factor is -2.0"),
        ({"rope_scaling": {"type": "yarn", "factor": math.inf}}, "rope_scaling.factor is inf"),
        ({"rope_scaling": {"type": ["yarn"], "factor": 2.0}}, "rope_scaling.type"),
        ({"rope_scaling": {"original_max_position_embeddings": 10**400}}, "rope_scaling.original"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": ["x"]}},
            "rope_scaling.short_factor",
        ),
        ({"rope_parameters": [1]}, "rope_parameters is"),
        ({"rope_parameters": {"rope_theta": "5e5"}}, "rope_parameters.rope_theta"),
        ({"rope_parameters": {"full_attention": [1]}}, "rope_parameters.full_attention"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 0}}},
            "rope_parameters.sliding_attention.rope_theta is 0",
        ),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            "rope_parameters and .*rope_scaling name two kinds",
        ),
        (
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
                "rope_scaling": {"type": "linear", "factor": 4.0},
            },
            "rope_parameters.factor and .*rope_scaling.factor differ",
        ),
        ({"model_type": "mamba2", "expand": "a", "hidden_size": "b"}, "hidden_size"),
    ],
)
def test_an_unusable_value_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], named: str, section: str | None
) -> None:
    with pytest.raises(ModelUnusableError, match=f"config.json: ({section}.)?{named}"):
        read(tmp_path, {section: settings} if section else settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 10000, "rms_norm_eps": 1, "sliding_window": 0, "rope_scaling": False},
        {"num_key_value_heads": [2, 4], "intermediate_size": [8, 8], "head_dim": None},
        {"time_step_limit": [0.0, math.inf], "quantization": {"bits": 4, "group_size": 64}},
        {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            "rope_scaling": {"type": "linear", "factor": 4},
        },
        {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 4}},
        {"text_config": {}},
        {"model_type": "mamba2", "expand": 2},
    ],
)
def test_values_found_in_real_models_are_accepted(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert read(tmp_path, settings).context_length >= 64


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": "llama", "x": {"__float__": [1]}}',
        '{"model_type": "llama", "x": "\\ud800"}',
        '{"model_type": "llama", "x": ' + "[" * 900 + "]" * 900 + "}",
    ],
)
def test_any_json_is_read_or_refused(tmp_path: Path, text: str) -> None:
    path = write_model(tmp_path, EMBEDDINGS, PLAIN)
    (path / "config.json").write_text(text)
    with contextlib.suppress(ModelUnusableError):
        read_model_directory(path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_a_dangling_link_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path, EMBEDDINGS, PLAIN)
    (path / name).unlink(missing_ok=True)
    (path / name).symlink_to("../../blobs/gone")
    with pytest.raises(ModelUnusableError, match=f"{name} is a broken link"):
        read_model_directory(path)


def test_a_quantized_output_layer_is_used_with_its_scales(tmp_path: Path) -> None:
    shapes: Shapes = {
        f"{layer}.{part}": ("F32", (4, 2))
        for layer in ("lm_head", "model.embed_tokens")
        for part in ("weight", "scales", "biases")
    }
    assert (
        read(tmp_path, {"tie_word_embeddings": True}, shapes).values["tie_word_embeddings"] is False
    )


def test_an_output_layer_only_in_the_index_is_not_tied(tmp_path: Path) -> None:
    path = write_model(tmp_path, EMBEDDINGS, PLAIN)
    names = [*EMBEDDINGS, *HEAD]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_model_directory(path).configuration.values["tie_word_embeddings"] is False
