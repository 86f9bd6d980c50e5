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
    Regex,
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

QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = ["The quick brown fox, the lazy dog: naïve café 日本語 12 345 you're I'LL\n\n x"] * 3
TEXTS = [
    "",
    "The quick brown fox",
    "  two  spaces ",
    "naïve cafe\u0301 日本語 😀 unseen: Ж",
    "you're I'LL 12345\n\n\n x",
    "<s>begins with it",
    "in <s> the </s> middle <pad><extra>",
    "<bos>x<|im_start|>user<|im_end|><|endoftext|><eos> <unk>",
]


def _byte_level() -> Tokenizer:
    """As GPT-2 and Llama 3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, ["<s>", "</s>", "<unk>"], pre_tokenizers.ByteLevel.alphabet())


def _qwen() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _trained(tokenizer, [], pre_tokenizers.ByteLevel.alphabet())
    # As the real ones: beyond the vocabulary, some of them not special.
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _metaspace(special: Sequence[str] = ("<s>", "</s>", "<unk>")) -> Tokenizer:
    """As Llama 2 and Gemma have it: spaces are letters, unknown letters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))  # noqa: S106 - no password
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _trained(tokenizer, special, [])
    file = json.loads(tokenizer.to_str())
    vocabulary = file["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    return Tokenizer.from_str(json.dumps(file))


def _gemma() -> Tokenizer:
    tokenizer = _metaspace(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return _with_bos(tokenizer, "<bos>")


def _trained(tokenizer: Tokenizer, special: Sequence[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _with_bos(tokenizer: Tokenizer, bos: str = "<s>") -> Tokenizer:
    id_ = tokenizer.token_to_id(bos)
    assert id_ is not None
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, id_)]
    )
    return tokenizer


def _described(tokenizer: Tokenizer, **changes: Any) -> dict[str, Any]:
    """The ``added_tokens_decoder`` that transformers writes; changes are made to the first."""
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    found = {
        str(id_): {name: getattr(token, name) for name in names}
        for id_, token in tokenizer.get_added_tokens_decoder().items()
    }
    found[min(found, key=int)] |= changes
    return {"added_tokens_decoder": found}


def _with_added(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken("<extra>", lstrip=True, rstrip=True)])
    return tokenizer


def _changed(tokenizer: Tokenizer, **parts: Any) -> Tokenizer:
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


GENERIC = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
NEW_NAME = GENERIC | {"tokenizer_class": "TokenizersBackend"}
LLAMA = GENERIC | {"tokenizer_class": "LlamaTokenizerFast", "unk_token": "<unk>"}
QWEN = {
    "tokenizer_class": "Qwen2Tokenizer",
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "errors": "replace",
    "split_special_tokens": False,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
}
GEMMA = {
    "tokenizer_class": "GemmaTokenizerFast",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "sp_model_kwargs": None,
    "spaces_between_special_tokens": False,
    "boi_token": "<mask>",
    "extra_special_tokens": {"boi_token": "<mask>"},
}

Make = Callable[[], Tokenizer]
Case = tuple[str, Make, dict[str, Any]]

PLAIN: dict[str, Case] = {
    "byte level": ("llama", _byte_level, GENERIC),
    "no tokens named": ("llama", _byte_level, {"tokenizer_class": "TokenizersBackend"}),
    "byte level with bos": ("llama", lambda: _with_bos(_byte_level()), GENERIC),
    "a model type with a class of its own": ("qwen3", lambda: _with_bos(_byte_level()), GENERIC),
    "a model type nobody knows": ("nobody", _byte_level, GENERIC),
    "the class's new name": ("llama", lambda: _with_bos(_byte_level()), NEW_NAME),
    "bos as an object": (
        "llama",
        _byte_level,
        GENERIC | {"bos_token": {"__type": "AddedToken", "content": "<s>", "special": True}},
    ),
    "tokens described": (
        "llama",
        lambda: _with_added(_byte_level()),
        GENERIC | _described(_with_added(_byte_level())),
    ),
    "more special tokens": (
        "llama",
        lambda: _with_added(_byte_level()),
        GENERIC | {"additional_special_tokens": ["<extra>"], "pad_token": "<unk>"},
    ),
    "a token of a name of its own": (
        "llama",
        lambda: _with_added(_byte_level()),
        GENERIC | {"image_token": "<extra>"},
    ),
    "metaspace": ("llama", _metaspace, GENERIC),
    "metaspace with bos": ("llama", lambda: _with_bos(_metaspace()), NEW_NAME),
    "settings without effect": (
        "llama",
        _byte_level,
        GENERIC
        | {"model_max_length": 5, "clean_up_tokenization_spaces": True, "chat_template": "x"},
    ),
    "add_bos_token, and the file does": (
        "llama",
        lambda: _with_bos(_byte_level()),
        GENERIC | {"add_bos_token": True, "add_eos_token": False},
    ),
    "no add_bos_token, nor does the file": (
        "llama",
        _byte_level,
        GENERIC | {"add_bos_token": False},
    ),
    "Qwen 2": ("qwen2", _qwen, QWEN | _described(_qwen())),
    "Qwen 3, tokens not described": ("qwen3", _qwen, QWEN),
    "Gemma": ("gemma3_text", _gemma, GEMMA | _described(_gemma())),
    "Gemma, tokens not described": ("gemma2", _gemma, GEMMA),
}

OTHERS: dict[str, Case] = {
    "Llama": ("llama", lambda: _with_bos(_metaspace()), LLAMA),
    "Llama, add_bos_token": ("llama", _metaspace, LLAMA | {"add_bos_token": True}),
    "Llama, no add_bos_token": (
        "llama",
        lambda: _with_bos(_metaspace()),
        LLAMA | {"add_bos_token": False},
    ),
    "add_bos_token, and the file does not": (
        "llama",
        _byte_level,
        GENERIC | {"add_bos_token": True},
    ),
    "no add_bos_token, and the file does": (
        "llama",
        lambda: _with_bos(_byte_level()),
        GENERIC | {"add_bos_token": False},
    ),
    "a model type that decides": ("qwen2", _byte_level, GENERIC),
    "Qwen with other words": (
        "qwen2",
        lambda: _changed(_qwen(), pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False)),
        QWEN,
    ),
    "Qwen without a normalizer": ("qwen3", lambda: _changed(_qwen(), normalizer=None), QWEN),
    "Qwen for another model": ("llama", _qwen, QWEN),
    "Qwen, a token that is not described": (
        "qwen2",
        lambda: _with_added(_qwen()),
        QWEN | _described(_qwen()),
    ),
    "Qwen, a special token with properties": (
        "qwen2",
        lambda: _with_added(_qwen()),
        QWEN | {"additional_special_tokens": ["<extra>"]},
    ),
    "Gemma with another unknown": ("gemma2", _gemma, GEMMA | {"unk_token": "<pad>"}),
    "Gemma with another decoder": (
        "gemma2",
        lambda: _changed(_gemma(), decoder=decoders.Fuse()),
        GEMMA,
    ),
    "a token that is not in the file": ("llama", _byte_level, GENERIC | {"pad_token": "<pad>"}),
    "a listed token that is not in the file": (
        "llama",
        _byte_level,
        GENERIC | {"extra_special_tokens": ["<extra>"]},
    ),
    "a token of its own that is not in the file": (
        "llama",
        _byte_level,
        GENERIC | {"image_token": "<extra>"},
    ),
    "a token described otherwise": (
        "llama",
        _byte_level,
        GENERIC | _described(_byte_level(), rstrip=True),
    ),
    "a setting nobody knows": ("llama", _byte_level, GENERIC | {"nobodys_setting": 1}),
    "a space in front": ("llama", _byte_level, GENERIC | {"add_prefix_space": True}),
    "tokens split": ("llama", _byte_level, GENERIC | {"split_special_tokens": True}),
    "a class nobody knows": ("llama", _byte_level, GENERIC | {"tokenizer_class": "Nobodys"}),
    "no class": ("llama", _byte_level, {"eos_token": "</s>"}),
}


def _write(path: Path, case: Case) -> dict[str, Any]:
    """Writes the directory; returns its configuration."""
    model_type, make, settings = case
    config = {"model_type": model_type, "eos_token_id": 7}
    make().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "config.json").write_text(json.dumps(config))
    return config


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
    config = _write(tmp_path, PLAIN[case])
    assert read_plain_tokenizer(tmp_path, config)
    _assert_as_transformers(tmp_path)


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_are_left_to_transformers(tmp_path: Path, case: str) -> None:
    config = _write(tmp_path, OTHERS[case])
    assert read_plain_tokenizer(tmp_path, config) is None
    _assert_as_transformers(tmp_path)


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
    _write(tmp_path, PLAIN["byte level"])
    assert read_plain_tokenizer(tmp_path, config) is None


@pytest.mark.parametrize("name", ["added_tokens.json", "tekken.json", "special_tokens_map.json"])
def test_a_file_beside_it_that_decides_otherwise(tmp_path: Path, name: str) -> None:
    _write(tmp_path, PLAIN["byte level"])
    (tmp_path / name).write_text("{}")
    assert read_plain_tokenizer(tmp_path, {"model_type": "llama", "eos_token_id": 7}) is None


@pytest.mark.parametrize("damaged", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"a": 1}', "\ud800"])
def test_files_that_cannot_be_read(tmp_path: Path, damaged: str, text: str | None) -> None:
    _write(tmp_path, PLAIN["byte level"])
    if text is None:
        (tmp_path / damaged).unlink()
    else:
        (tmp_path / damaged).write_bytes(text.encode(errors="surrogatepass"))
    assert read_plain_tokenizer(tmp_path, {"model_type": "llama", "eos_token_id": 7}) is None


def test_the_ends_of_text_are_those_of_both_files(tmp_path: Path) -> None:
    _write(tmp_path, PLAIN["byte level"])
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
    assert rebuilt <= _plain_tokenizer._OTHER_CLASS
