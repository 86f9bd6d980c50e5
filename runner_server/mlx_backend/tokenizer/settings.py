"""Settings of a tokenizer, from files other than ``tokenizer.json``.

These are ``tokenizer_config.json`` and the older ``special_tokens_map.json`` and
``added_tokens.json``, all of them optional.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from runner_common.model_directory import is_lfs_pointer, lfs_error
from runner_server.errors import ModelUnsupported

CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE = "special_tokens_map.json"
_ADDED_FILE = "added_tokens.json"

_ROLES = (
    "bos_token",
    "cls_token",
    "eos_token",
    "mask_token",
    "pad_token",
    "sep_token",
    "unk_token",
)
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_PROPERTIES = ("lstrip", "normalized", "rstrip", "single_word", "special")


@dataclass(frozen=True)
class TokenizerSettings:
    """Settings of a tokenizer, except for the class.

    Attributes:
        bos_token: The beginning-of-text token, if a file names one.
        eos_token: The end-of-text token, if a file names one.
        adds_bos: The value of ``add_bos_token``; None if it is not set.
        adds_eos: Whether ``add_eos_token`` is true.
        splits_special_tokens: Whether special tokens in a text are split like other text.
        described: Tokens with properties, by id.
        named: Texts of all tokens that have a role or are listed as special.
        roles: Texts of the tokens that have a role (``bos_token``, ...), by role.
    """

    bos_token: str | None = None
    eos_token: str | None = None
    adds_bos: bool | None = None
    adds_eos: bool = False
    splits_special_tokens: bool = False
    described: dict[int, AddedToken] | None = None
    named: tuple[str, ...] = ()
    roles: dict[str, str] = field(default_factory=dict)


def read_settings(path: Path) -> TokenizerSettings:
    """Read the tokenizer settings of a model directory.

    Raises:
        ModelUnsupported: A file is not JSON, or a value has the wrong type.
    """
    config = _read(path / CONFIG_FILE)
    roles = _read(path / _MAP_FILE) | {key: config[key] for key in _ROLES if key in config}
    adds_bos = config.get("add_bos_token")
    try:
        return TokenizerSettings(
            bos_token=_text(roles.get("bos_token")),
            eos_token=_text(roles.get("eos_token")),
            adds_bos=adds_bos if isinstance(adds_bos, bool) else None,
            adds_eos=config.get("add_eos_token") is True,
            splits_special_tokens=config.get("split_special_tokens") is True,
            described=_described(config, _read(path / _ADDED_FILE)),
            named=tuple(dict.fromkeys(_named(roles, config))),
            roles={role: text for role in _ROLES if (text := _text(roles.get(role)))},
        )
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ModelUnsupported(
            f"the special tokens that {path / CONFIG_FILE} and the files beside it describe cannot "
            f"be used ({type(error).__name__}: {error}); expected strings or token objects",
            model=str(path),
        ) from error


def _read(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file does not exist."""
    if not file.is_file():
        return {}
    try:
        if is_lfs_pointer(file):
            raise ModelUnsupported(str(lfs_error(file)), model=str(file.parent))
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnsupported(
            f"{file} cannot be read ({type(error).__name__}: {error}); expected JSON",
            model=str(file.parent),
        ) from error
    if not isinstance(found, dict):
        raise ModelUnsupported(f"{file} is not a JSON object", model=str(file.parent))
    return found


def _text(token: Any) -> str | None:
    """Return the text of a token, which may be a string or an object with properties."""
    text = token["content"] if isinstance(token, dict) and "content" in token else token
    if text is not None and not isinstance(text, str):
        raise TypeError(f"{text!r} is not a token")
    return text or None


def _described(config: dict[str, Any], added: dict[str, Any]) -> dict[int, AddedToken]:
    found = {
        int(id_): AddedToken(text, special=True, normalized=False) for text, id_ in added.items()
    }
    for id_, token in (config.get("added_tokens_decoder") or {}).items():
        properties = {key: token[key] for key in _PROPERTIES if key in token}
        found[int(id_)] = AddedToken(token["content"], **properties)
    return dict(sorted(found.items()))


def _named(roles: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    for key in _ROLES:
        if text := _text(roles.get(key)):
            yield text
    for key in _LISTS:
        listed = config.get(key) or []
        for token in listed.values() if isinstance(listed, dict) else listed:
            if text := _text(token):
                yield text
