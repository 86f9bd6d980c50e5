"""Tokenizers that ``tokenizer.json`` describes alone, read without transformers.

Importing transformers takes about a second, and for the tokenizers here its answer
is the file as it stands. For others it adds tokens that other files name, or builds
a tokenizer that differs from the file. So a directory is read here only if every one
of its settings is known to change no id, and everything else is left to transformers.
Checked against transformers 5.23; the tests compare the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from runner_server.adapter._panics import NO_PANICS
from runner_server.adapter._rebuilt_tokenizer import REBUILT_CLASSES, RebuiltClass

_CLASSES = frozenset({"PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes that take ``tokenizer.json`` as it is."""

_OTHER_CLASS = frozenset(
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
"""Model types for which transformers takes another class than one of those."""

_ROLES = frozenset(
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
_ADDED = {"add_bos_token": "bos_token", "add_eos_token": "eos_token"}
_OFF = frozenset({"add_prefix_space", "split_special_tokens"})
"""Settings that change ids unless they are off."""

_WITHOUT_EFFECT = frozenset(
    {
        "added_tokens_decoder",
        "backend",
        "chat_template",
        "clean_up_tokenization_spaces",
        "errors",
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
        "sp_model_kwargs",
        "spaces_between_special_tokens",
        "stride",
        "tokenizer_class",
        "truncation_side",
        "truncation_strategy",
        "use_default_system_prompt",
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
    if ends is None or _is_decided_elsewhere(path, config):
        return None
    try:
        settings = _read_settings(path, str(config.get("model_type")))
        with NO_PANICS:
            tokenizer = Tokenizer.from_file(str(path / "tokenizer.json")) if settings else None
            if not (settings and tokenizer and _is_as_file(tokenizer, settings)):
                return None
    except Exception:  # noqa: BLE001 - tokenizers raises no narrower type
        return None
    eos = _id_of(tokenizer, settings.roles.get("eos_token"))
    return PlainTokenizer(tokenizer, settings.roles.get("bos_token"), frozenset([*ends, *eos]))


def _ids(value: object) -> list[int] | None:
    values = value if isinstance(value, list) else [value]
    return [*values] if all(isinstance(item, int) for item in values) else None


def _is_decided_elsewhere(path: Path, config: dict[str, Any]) -> bool:
    return "model_name" in config or any((path / name).exists() for name in _OTHER_FILES)


@dataclass(frozen=True)
class _Settings:
    """What ``tokenizer_config.json`` says.

    Attributes:
        rebuilt: What the class builds, if it builds anything.
        roles: Tokens by their role.
        others: More tokens it names.
        described: Tokens with their properties, by id.
        added: Roles of the tokens that are put around a prompt; None if it does not say.
    """

    rebuilt: RebuiltClass | None
    roles: dict[str, str]
    others: frozenset[str]
    described: dict[int, AddedToken]
    added: frozenset[str] | None


def _read_settings(path: Path, model_type: str) -> _Settings | None:
    """None unless every setting is one that changes no id, or is compared with the file."""
    found = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))
    name = found["tokenizer_class"]
    rebuilt = REBUILT_CLASSES.get(name.removesuffix("Fast"))
    if not _is_known_class(name, rebuilt, model_type):
        return None
    described = found.get("added_tokens_decoder") or {}
    # transformers reads the other file where this one does not describe the tokens.
    if not described and (path / _TOKENS_MAP).exists():
        return None
    if not all(_is_known(key, value) for key, value in found.items()):
        return None
    return _Settings(
        rebuilt=rebuilt,
        roles=_roles(found, rebuilt.defaults if rebuilt else {}),
        others=frozenset(_others(found)),
        described={int(id_): AddedToken(**token) for id_, token in described.items()},
        added=_added(found),
    )


def _is_known_class(name: str, rebuilt: RebuiltClass | None, model_type: str) -> bool:
    """Whether transformers takes the class that is named, and its ways are known here."""
    if rebuilt:
        return model_type in rebuilt.model_types
    return name in _CLASSES and model_type not in _OTHER_CLASS


def _is_known(key: str, value: object) -> bool:
    if key in _OFF:
        return not value
    return key in _WITHOUT_EFFECT or key in _LISTS or key.endswith("_token")


def _roles(found: dict[str, Any], defaults: dict[str, str]) -> dict[str, str]:
    roles = defaults | {key: found[key] for key in _ROLES & found.keys()}
    return {key: _text(token) for key, token in roles.items() if token is not None}


def _others(found: dict[str, Any]) -> Iterator[str]:
    """Tokens in lists, and under names of a model's own."""
    for key in _LISTS & found.keys():
        listed = found[key] or []
        yield from map(_text, listed.values() if isinstance(listed, dict) else listed)
    for key, token in found.items():
        if key.endswith("_token") and key not in _ROLES | _ADDED.keys():
            if not isinstance(token, str):
                raise TypeError(f"{key}: {token!r} is no token")
            yield token


def _text(token: Any) -> str:
    """A token's text: written alone, or with its properties."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is no token")
    return text


def _added(found: dict[str, Any]) -> frozenset[str] | None:
    if not _ADDED.keys() & found.keys():
        return None
    return frozenset(role for key, role in _ADDED.items() if found.get(key))


def _is_as_file(tokenizer: Tokenizer, settings: _Settings) -> bool:
    """Whether transformers would make of the settings what the file is already."""
    tokens = tokenizer.get_added_tokens_decoder()
    # Two tokens are equal if their texts are; repr shows their properties too.
    have = {id_: repr(token) for id_, token in tokens.items()}
    if any(have.get(id_) != repr(token) for id_, token in settings.described.items()):
        return False
    named = {*settings.roles.values(), *settings.others}
    if not named <= {token.content for token in tokens.values()}:
        return False
    if settings.added is not None and not _adds(tokenizer, settings):
        return False
    if settings.rebuilt is None:
        return True
    if settings.described and settings.described.keys() != tokens.keys():
        return False
    return settings.rebuilt.is_as_file(tokenizer, named, settings.roles.get("unk_token"))


def _adds(tokenizer: Tokenizer, settings: _Settings) -> bool:
    """Whether the file puts around a prompt what is asked for.

    Releases of transformers differ in which of the two they obey.
    """
    begin, end = (
        _id_of(tokenizer, settings.roles.get(role)) if role in (settings.added or ()) else []
        for role in ("bos_token", "eos_token")
    )
    text = tokenizer.encode("a", add_special_tokens=False).ids
    found: list[int] = tokenizer.encode("a").ids
    return found == [*begin, *text, *end]


def _id_of(tokenizer: Tokenizer, token: str | None) -> list[int]:
    id_ = None if token is None else tokenizer.token_to_id(token)
    return [] if id_ is None else [id_]
