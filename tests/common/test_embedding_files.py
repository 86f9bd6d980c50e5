"""How a model embeds texts, by the files of sentence-transformers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from runner_common.model_directory import ModelDirectory, ModelUnusableError, read_model_directory
from support.embedding_models import module, say_that_it_embeds
from support.safetensors_files import Shapes, write_model

PLAIN: dict[str, Any] = {"model_type": "qwen3", "max_position_embeddings": 64}
BASE: Shapes = {
    "embed_tokens.weight": ("F32", (4, 2)),
    "layers.0.mlp.up_proj.weight": ("F32", (4, 2)),
    "norm.weight": ("F32", (2,)),
}
PREFIXED: Shapes = {f"model.{name}": shape for name, shape in BASE.items()}

FLAGS = {
    "word_embedding_dimension": 2,
    "pooling_mode_cls_token": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
    "pooling_mode_weightedmean_tokens": False,
    "pooling_mode_lasttoken": False,
    "include_prompt": True,
}
"""A pooling's settings as sentence-transformers 2 to 5.3 writes them, without a mode."""


def read(path: Path, config: dict[str, Any] | None = None, shapes: Shapes = BASE) -> ModelDirectory:
    return read_model_directory(write_model(path, shapes, {**PLAIN, **(config or {})}))


@pytest.mark.parametrize(
    ("settings", "modes"),
    [
        ({**FLAGS, "pooling_mode_lasttoken": True}, ("lasttoken",)),
        ({**FLAGS, "pooling_mode_mean_tokens": True}, ("mean",)),
        (
            {**FLAGS, "pooling_mode_lasttoken": True, "pooling_mode_cls_token": True},
            ("cls", "lasttoken"),
        ),
        (FLAGS, ("mean",)),
        ({"embedding_dimension": 2, "pooling_mode": "weightedmean"}, ("weightedmean",)),
        ({"pooling_mode": ["lasttoken", "mean"], "embedding_dimension": 2}, ("lasttoken", "mean")),
        (
            {"pooling_mode": "cls", "embedding_dimension": 2, "pooling_mode_mean_tokens": True},
            ("cls",),
        ),
    ],
)
def test_the_pooling_has_the_modes_of_its_file(
    tmp_path: Path, settings: dict[str, Any], modes: tuple[str, ...]
) -> None:
    say_that_it_embeds(tmp_path, settings)
    found = read(tmp_path).embedding
    assert (found.problem, found.pooling, found.dimension) == ("", modes, 2)


def test_normalization_and_longest_text_are_read(tmp_path: Path) -> None:
    say_that_it_embeds(tmp_path, transformer={"max_seq_length": 7, "do_lower_case": False})
    found = read(tmp_path).embedding
    assert (found.normalizes, found.max_tokens) == (True, 7)
    say_that_it_embeds(tmp_path, normalizes=False, transformer={"max_seq_length": None})
    found = read(tmp_path).embedding
    assert (found.normalizes, found.max_tokens) == (False, None)


def test_a_model_without_the_files_completes_texts(tmp_path: Path) -> None:
    found = read(tmp_path)
    assert "no modules.json" in found.embedding.problem
    assert found.configuration.has_output_layer


def test_modules_of_newer_releases_are_known(tmp_path: Path) -> None:
    say_that_it_embeds(tmp_path)
    file = tmp_path / "modules.json"
    names = ("base.modules.transformer.", "sentence_transformer.modules.pooling.")
    modules = json.loads(file.read_text())
    for entry, name in zip(modules, names, strict=False):
        entry["type"] = entry["type"].replace("models.", name)
    file.write_text(json.dumps(modules))
    assert not read(tmp_path).embedding.problem


def _write_modules(*modules: object) -> Any:
    return lambda path: (path / "modules.json").write_text(json.dumps(modules))


def _pooling(**settings: Any) -> Any:
    return lambda path: say_that_it_embeds(path, {**FLAGS, **settings})


def _transformer(**settings: Any) -> Any:
    return lambda path: say_that_it_embeds(path, transformer=settings)


def _file(name: str, content: Any) -> Any:
    return lambda path: (path / name).write_text(json.dumps(content))


OWN = {**module(0, "Transformer"), "type": "custom_st.Transformer"}
WITH_ARGUMENTS = {**module(0, "Transformer"), "kwargs": {"task": "retrieval"}}
ELSEWHERE = {**module(0, "Transformer"), "path": "0_Transformer"}
ABOVE = {**module(1, "Pooling"), "path": "../other"}

PROBLEMS: dict[str, tuple[Any, str]] = {
    "dense layer": (
        _write_modules(module(0, "Transformer"), module(1, "Pooling"), module(2, "Dense")),
        "Transformer, Pooling, Dense",
    ),
    "no pooling": (_write_modules(module(0, "Transformer")), "modules.json"),
    "module of the model's own": (
        _write_modules(OWN, module(1, "Pooling")),
        "custom_st.Transformer",
    ),
    "arguments of a module": (_write_modules(WITH_ARGUMENTS, module(1, "Pooling")), "retrieval"),
    "transformer elsewhere": (_write_modules(ELSEWHERE, module(1, "Pooling")), "0_Transformer"),
    "folder outside": (_write_modules(module(0, "Transformer"), ABOVE), "../other"),
    "not a module": (_write_modules(1), "not a module"),
    "not a list": (_file("modules.json", {}), "not a JSON array"),
    "maximum": (_pooling(pooling_mode_max_tokens=True), "'max'"),
    "unknown mode": (_pooling(pooling_mode="attention"), "'attention'"),
    "mode of another type": (_pooling(pooling_mode=3), "pooling_mode is 3"),
    "prompt apart": (
        _pooling(pooling_mode_mean_tokens=True, include_prompt=False),
        "include_prompt",
    ),
    "lower case": (_transformer(do_lower_case=True), "do_lower_case"),
    "other task": (_transformer(transformer_task="text-generation"), "text-generation"),
    "other output": (
        _transformer(modality_config={"text": {"method": "get_text_features"}}),
        "get_text_features",
    ),
    "chat template": (
        _transformer(processing_kwargs={"text": {"chat_template": "x"}}),
        "chat_temp",
    ),
    "values of other types": (_transformer(modality_config=[1]), "invalid contents"),
    "sparse": (
        _file("config_sentence_transformers.json", {"model_type": "SparseEncoder"}),
        "Sparse",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_not_computed_is_a_problem_with_a_name(tmp_path: Path, name: str) -> None:
    change, named = PROBLEMS[name]
    say_that_it_embeds(tmp_path)
    change(tmp_path)
    found = read(tmp_path)
    assert named in found.embedding.problem
    assert str(tmp_path) in found.embedding.problem
    assert found.configuration.has_output_layer


@pytest.mark.parametrize(
    "config",
    [
        {"auto_map": {"AutoModel": "modeling_qwen.Qwen2Model"}},
        {"is_causal": False},
        {"text_config": {"use_bidirectional_attention": True}},
    ],
)
def test_attention_to_later_tokens_is_a_problem(tmp_path: Path, config: dict[str, Any]) -> None:
    say_that_it_embeds(tmp_path)
    assert read(tmp_path, config).embedding.problem


def test_an_instruction_apart_does_not_change_the_last_token(tmp_path: Path) -> None:
    say_that_it_embeds(tmp_path, {"pooling_mode": "lasttoken", "include_prompt": False})
    assert not read(tmp_path).embedding.problem


def test_a_pipe_in_place_of_a_file_is_not_opened(tmp_path: Path) -> None:
    say_that_it_embeds(tmp_path)
    (tmp_path / "1_Pooling" / "config.json").unlink()
    os.mkfifo(tmp_path / "1_Pooling" / "config.json")
    with pytest.raises(ModelUnusableError, match="not a file"):
        read(tmp_path)


def test_names_of_a_base_model_get_their_prefix(tmp_path: Path) -> None:
    assert read(tmp_path / "base").name_prefix == "model."
    assert read(tmp_path / "whole", shapes=PREFIXED).name_prefix == ""


@pytest.mark.parametrize("embeds", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("has_head", [True, False])
def test_only_a_model_that_embeds_needs_no_output_layer(
    tmp_path: Path, *, embeds: bool, tied: bool, has_head: bool
) -> None:
    if embeds:
        say_that_it_embeds(tmp_path)
    head: Shapes = {"lm_head.weight": ("F32", (4, 2))} if has_head else {}
    found = read(tmp_path, {"tie_word_embeddings": tied}, {**PREFIXED, **head}).configuration
    is_headless = embeds and not tied and not has_head
    assert found.has_output_layer is not is_headless
    if is_headless:
        # mlx_lm builds the model only with an output layer.
        assert found.values["tie_word_embeddings"]
