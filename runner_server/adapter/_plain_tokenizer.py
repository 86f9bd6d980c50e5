"""Tokenizers that ``tokenizer.json`` describes alone, read without transformers.

Importing transformers takes about a second, and for the tokenizers here its answer
is the file as it stands. For others it adds tokens that other files name, or builds
the tokenizer anew in Python. So a directory is read here only if every one of its
settings is known to change no id, and everything else is left to transformers.
Checked against transformers 5.23; the tests compare the two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes that take ``tokenizer.json`` as it is."""

_REBUILT = frozenset(
    {
        "hyperclovax_vision_v2",
        "qwen2",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen4_exp",
        "siglip2",
    }
)
"""Model types for which transformers takes another class than the one that is named."""

_NAMED = frozenset(
    {
        "bos_token",
        "cls_token",
        "eos_token",
        "mask_token",
        "pad_token",
        "sep_token",
        "unk_token",
    }
)
_LISTS = frozenset({"additional_special_tokens", "extra_special_tokens"})

_WITHOUT_EFFECT = frozenset(
    {
        "added_tokens_decoder",
        "backend",
        "chat_template",
        "clean_up_tokenization_spaces",
        "is_local",
        "local_files_only",
        "max_length",
        "model_input_names",
        "model_max_length",
        "name_or_path",
        "pad_to_multiple_of",
        "pad_token_type_id",
        "padding_side",
        "processor_class",
        "stride",
        "tokenizer_class",
        "truncation_side",
        "truncation_strategy",
    }
)
"""Settings that change no id, or that are compared with ``tokenizer.json`` below."""

_OTHER_FILES = ("added_tokens.json", "tekken.json")
_TOKENS_MAP = "special_tokens_map.json"


@dataclass(frozen=True)
class PlainTokenizer:
    """A tokenizer and what is said about it beside ``tokenizer.json``.

    Attributes:
        tokenizer: A ``tokenizers.Tokenizer``.
        bos_token: What a text begins with, if anything.
        eos_token_ids: What ends a text.
    """

    tokenizer: Any
    bos_token: str | None
    eos_token_ids: frozenset[int]


def read_plain_tokenizer(path: Path, config: dict[str, Any]) -> PlainTokenizer | None:
    """Reads a tokenizer without transformers.

    Args:
        path: The model's directory.
        config: The model's configuration.

    Returns:
        None where transformers has to read it, or to say what is wrong with it.
    """
    ends = _ids(config.get("eos_token_id"))
    # Without these mlx_lm looks elsewhere for what ends a text.
    if ends is None or not _is_left_alone(path, config):
        return None
    try:
        found = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings = _settings(found) if _is_known(path, found) else None
        if settings is None:
            return None
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception:  # noqa: BLE001 - tokenizers raises no narrower type
        return None
    if not _is_whole(tokenizer, settings):
        return None
    added = tokenizer.get_added_tokens_decoder()
    ends += [id_ for id_, token in added.items() if token.content == settings.eos_token]
    return PlainTokenizer(tokenizer, settings.bos_token, frozenset(ends))


def _ids(value: object) -> list[int] | None:
    values = value if isinstance(value, list) else [value]
    return [*values] if all(isinstance(item, int) for item in values) else None


def _is_left_alone(path: Path, config: dict[str, Any]) -> bool:
    """Whether nothing around the tokenizer's files makes transformers take another class."""
    if config.get("model_type") in _REBUILT or "model_name" in config:
        return False
    return not any((path / name).exists() for name in _OTHER_FILES)


def _is_known(path: Path, found: dict[str, Any]) -> bool:
    """Whether every setting of ``tokenizer_config.json`` is one that changes no id."""
    # transformers reads the other file where this one does not describe the tokens.
    is_alone = found.get("added_tokens_decoder") or not (path / _TOKENS_MAP).exists()
    known = _NAMED | _LISTS | _WITHOUT_EFFECT
    return bool(is_alone and found["tokenizer_class"] in _CLASSES and found.keys() <= known)


@dataclass(frozen=True)
class _Settings:
    """What ``tokenizer_config.json`` says: tokens by role, all it names, those it describes."""

    bos_token: str | None
    eos_token: str | None
    special_tokens: frozenset[str]
    described: dict[int, AddedToken]


def _settings(found: dict[str, Any]) -> _Settings:
    named = {name: _text(found[name]) for name in _NAMED if found.get(name) is not None}
    listed = [_text(token) for name in _LISTS for token in _list(found.get(name))]
    described = found.get("added_tokens_decoder") or {}
    return _Settings(
        bos_token=named.get("bos_token"),
        eos_token=named.get("eos_token"),
        special_tokens=frozenset({*named.values(), *listed}),
        described={int(id_): AddedToken(**token) for id_, token in described.items()},
    )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | None):
        raise TypeError(f"{value!r} is no list")
    return value or []


def _text(token: Any) -> str:
    """A token's text: written alone, or with its properties."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no token")
    return text


def _is_whole(tokenizer: Tokenizer, settings: _Settings) -> bool:
    """Whether transformers would find nothing to add: what is named is there, and the same."""
    added = tokenizer.get_added_tokens_decoder()
    # Two tokens are equal if their texts are; repr shows their properties too.
    have = {id_: repr(token) for id_, token in added.items()}
    if any(have.get(id_) != repr(token) for id_, token in settings.described.items()):
        return False
    return settings.special_tokens <= {token.content for token in added.values()}
