"""Text becomes the ids that transformers gives, whether or not it is what reads the files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from runner_server.adapter._plain_tokenizer import read_plain_tokenizer
from runner_server.adapter.codec import load_codec
from runner_server.adapter.names import load_tokenizer

_CORPUS = [
    "The quick brown fox, the lazy dog: naïve café 日本語 😀 </s> <s> 12 345 you're I'LL\n\n x"
]
TEXTS = [
    "",
    "The quick brown fox",
    "  two  spaces ",
    "naïve cafe\u0301 日本語 😀 unseen: Ж",
    "you're I'LL 12345\n\n\n x",
    "<s>begins with it",
    "in <s> the </s> middle <pad><extra>",
]
SPECIAL = ["<s>", "</s>", "<unk>"]


def _byte_level() -> Tokenizer:
    """As GPT-2 and Llama 3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def _metaspace() -> Tokenizer:
    """As Llama 2 and Gemma have it: spaces are letters, unknown letters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))  # noqa: S106
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _trained(tokenizer, [], more=[f"<0x{byte:02X}>" for byte in range(256)])


def _trained(tokenizer: Tokenizer, alphabet: list[str], more: Sequence[str] = ()) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_tokens(list(more))
    return tokenizer


def _with_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def _described(tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    """The ``added_tokens_decoder`` that transformers writes; changes are made to ``<s>``."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    found = {
        str(id_): {name: getattr(token, name) for name in names}
        for id_, token in tokenizer.get_added_tokens_decoder().items()
    }
    found["0"] |= changes
    return {"added_tokens_decoder": found}


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken("<extra>", lstrip=True, rstrip=True)])
    return tokenizer


GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
NEW_NAME = GENERIC | {"tokenizer_class": "TokenizersBackend"}
LLAMA = GENERIC | {"tokenizer_class": "LlamaTokenizerFast", "unk_token": "<unk>"}
GEMMA = LLAMA | {"tokenizer_class": "GemmaTokenizerFast"}

Make = Callable[[], Tokenizer]

PLAIN: dict[str, tuple[Make, dict[str, Any]]] = {
    "byte level": (_byte_level, GENERIC),
    "byte level, no tokens named": (_byte_level, {"tokenizer_class": "TokenizersBackend"}),
    "byte level with bos": (lambda: _with_bos(_byte_level()), GENERIC),
    "the class's new name": (lambda: _with_bos(_byte_level()), NEW_NAME),
    "bos as an object": (
        _byte_level,
        GENERIC | {"bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}},
    ),
    "tokens described": (
        lambda: _with_added(_byte_level()),
        GENERIC | _described(_with_added(_byte_level())),
    ),
    "more special tokens": (
        lambda: _with_added(_byte_level()),
        GENERIC | {"additional_special_tokens": ["<extra>"], "pad_token": "<unk>"},
    ),
    "metaspace": (_metaspace, GENERIC),
    "metaspace with bos": (lambda: _with_bos(_metaspace()), NEW_NAME | {"unk_token": "<unk>"}),
    "settings without effect": (
        _byte_level,
        GENERIC
        | {"model_max_length": 5, "clean_up_tokenization_spaces": True, "chat_template": "x"},
    ),
}

OTHERS: dict[str, tuple[Make, dict[str, Any]]] = {
    "Llama": (lambda: _with_bos(_metaspace()), LLAMA),
    "Llama, add_bos_token": (_metaspace, LLAMA | {"add_bos_token": True}),
    "Llama, no add_bos_token": (lambda: _with_bos(_metaspace()), LLAMA | {"add_bos_token": False}),
    "Gemma": (lambda: _with_bos(_metaspace()), GEMMA),
    "generic, add_bos_token": (_byte_level, GENERIC | {"add_bos_token": True}),
    "generic, no add_bos_token": (
        lambda: _with_bos(_byte_level()),
        GENERIC | {"add_bos_token": False},
    ),
    "Qwen": (_byte_level, GENERIC | {"tokenizer_class": "Qwen2Tokenizer"}),
    "a token that is not in the file": (_byte_level, GENERIC | {"pad_token": "<pad>"}),
    "a listed token that is not in the file": (
        _byte_level,
        GENERIC | {"extra_special_tokens": ["<extra>"]},
    ),
    "a token of a name of its own": (_byte_level, GENERIC | {"image_token": "<extra>"}),
    "a token described otherwise": (
        _byte_level,
        GENERIC | _described(_byte_level(), rstrip=True),
    ),
    "a setting nobody knows": (_byte_level, GENERIC | {"add_prefix_space": True}),
    "tokens split": (_byte_level, GENERIC | {"split_special_tokens": True}),
    "a class nobody knows": (_byte_level, GENERIC | {"tokenizer_class": "NobodysTokenizer"}),
    "no class": (_byte_level, {"eos_token": "</s>"}),
}


def _write(path: Path, make: Make, settings: dict[str, Any], model_type: str = "llama") -> Path:
    make().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": 7}))
    return path


def _assert_as_transformers(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    codec, eos_token_ids = load_codec(path, config)
    theirs = load_tokenizer(path, {"trust_remote_code": False}, eos_token_ids=7)
    assert eos_token_ids == theirs.eos_token_ids
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert codec.encode(text, as_prompt=False) == ids, text
        again = theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert codec.decode(ids) == again, text
        # What a prompt begins with is not put in front of itself.
        has_bos = bool(theirs.bos_token) and text.startswith(theirs.bos_token)
        expected = theirs.encode(text, add_special_tokens=not has_bos)
        assert codec.encode(text, as_prompt=True) == expected, text


@pytest.mark.parametrize("case", PLAIN)
def test_plain_files_are_read_as_transformers_reads_them(tmp_path: Path, case: str) -> None:
    path = _write(tmp_path, *PLAIN[case])
    assert read_plain_tokenizer(path, {"model_type": "llama", "eos_token_id": 7})
    _assert_as_transformers(path)


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_are_left_to_transformers(tmp_path: Path, case: str) -> None:
    path = _write(tmp_path, *OTHERS[case])
    assert read_plain_tokenizer(path, {"model_type": "llama", "eos_token_id": 7}) is None
    _assert_as_transformers(path)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "eos_token_id": None},
        {"model_type": "llama", "eos_token_id": "</s>"},
        {"model_type": "llama", "eos_token_id": [7, "</s>"]},
        {"model_type": "qwen2", "eos_token_id": 7},
        {"model_type": "llama", "model_name": "qwen2", "eos_token_id": 7},
    ],
    ids=str,
)
def test_a_config_that_decides_otherwise(tmp_path: Path, config: dict[str, Any]) -> None:
    _write(tmp_path, _byte_level, GENERIC)
    assert read_plain_tokenizer(tmp_path, config) is None


@pytest.mark.parametrize("name", ["added_tokens.json", "tekken.json", "special_tokens_map.json"])
def test_a_file_beside_it_that_decides_otherwise(tmp_path: Path, name: str) -> None:
    _write(tmp_path, _byte_level, GENERIC)
    (tmp_path / name).write_text("{}")
    assert read_plain_tokenizer(tmp_path, {"model_type": "llama", "eos_token_id": 7}) is None


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"a": 1}', "\ud800"])
def test_files_that_cannot_be_read(tmp_path: Path, damaged: str, text: str | None) -> None:
    _write(tmp_path, _byte_level, GENERIC)
    if text is None:
        (tmp_path / damaged).unlink()
    else:
        (tmp_path / damaged).write_bytes(text.encode(errors="surrogatepass"))
    assert read_plain_tokenizer(tmp_path, {"model_type": "llama", "eos_token_id": 7}) is None


def test_the_ends_of_text_are_those_of_both_files(tmp_path: Path) -> None:
    _write(tmp_path, _byte_level, GENERIC)
    plain = read_plain_tokenizer(tmp_path, {"model_type": "llama", "eos_token_id": [7, 9]})
    assert plain
    assert plain.bos_token == "<s>"  # noqa: S105 - no password
    assert plain.eos_token_ids == {1, 7, 9}


def test_the_model_types_that_get_another_class_are_known() -> None:
    """Fails when a release of transformers knows more of them."""
    from transformers.models.auto import tokenization_auto as auto

    from runner_server.adapter import _plain_tokenizer

    generic = {
        "TokenizersBackend",
        "PythonBackend",
        "PreTrainedTokenizerFast",
        "MistralCommonBackend",
        None,
    }
    rebuilt = {
        model_type
        for model_type in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
        if auto.TOKENIZER_MAPPING_NAMES.get(model_type) not in generic
    }
    assert rebuilt
    assert rebuilt <= _plain_tokenizer._REBUILT
