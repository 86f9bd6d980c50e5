"""Reading of ``tokenizer.json``.

Only that file defines the tokenizer. The class named in ``tokenizer_config.json`` is ignored,
because transformers rebuilds some classes from vocabulary and merges, without the file's normalizer
and pre-tokenizer. With the real files of GPT-4o under a Llama configuration, 86 of 457 texts became
other tokens; with those of Llama 2, 85 of 421.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from runner_common.model_directory import ModelUnusableError, is_lfs_pointer, lfs_error
from runner_server.errors import ModelUnsupported
from runner_server.mlx_backend.tokenizer.panics import NO_PANICS
from runner_server.mlx_backend.tokenizer.settings import CONFIG_FILE, TokenizerSettings

logger = logging.getLogger(__name__)

FILE = "tokenizer.json"


def read_tokenizer_file(path: Path, settings: TokenizerSettings) -> Any:
    """Read ``tokenizer.json``, and add tokens described only by the settings.

    Args:
        path: The model's directory.
        settings: The settings from the other files.

    Returns:
        A ``tokenizers.Tokenizer``.

    Raises:
        ModelUnsupported: The file cannot be read, or lacks a token that the settings name.
    """
    file = path / FILE
    try:
        tokenizer = _read(file)
    except ModelUnusableError as error:
        raise ModelUnsupported(str(error), model=str(path)) from error
    except Exception as error:
        raise ModelUnsupported(
            f"{file} cannot be read ({type(error).__name__}: {error}); expected a tokenizer of "
            "the tokenizers library",
            model=str(path),
        ) from error
    tokenizer.encode_special_tokens = settings.splits_special_tokens
    _add_described(tokenizer, settings.described or {}, path)
    _check_named(tokenizer, settings, path)
    return tokenizer


def _read(file: Path) -> Any:
    if is_lfs_pointer(file):
        raise lfs_error(file)
    with file.open("rb") as opened:
        has_mark = opened.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        content = opened.read() if has_mark else b""
    with NO_PANICS:
        return Tokenizer.from_buffer(content) if has_mark else Tokenizer.from_file(str(file))


def _add_described(tokenizer: Any, described: Mapping[int, AddedToken], path: Path) -> None:
    """Add the tokens that the settings describe with an id and the file does not treat as added.

    A token with another id in the file keeps that id.

    Raises:
        ModelUnsupported: A token would get another id than the one described.
    """
    added = tokenizer.get_added_tokens_decoder()
    missing = {
        id_: token
        for id_, token in described.items()
        if id_ not in added and tokenizer.token_to_id(token.content) in (None, id_)
    }
    with NO_PANICS:
        tokenizer.add_tokens(list(missing.values()))
    for id_, token in missing.items():
        if (found := tokenizer.token_to_id(token.content)) != id_:
            raise ModelUnsupported(
                f"the files beside {path / FILE} describe token {id_} as {token.content!r}, which "
                f"it lacks, and its next free id is {found}; use the tokenizer.json that belongs "
                "to them, or add the token to it",
                model=str(path),
            )


def _check_named(tokenizer: Any, settings: TokenizerSettings, path: Path) -> None:
    """Refuse a file that lacks a token this runner needs; warn about any other missing token.

    Raises:
        ModelUnsupported: The end-of-text token, or a beginning-of-text token to add, is missing.
    """
    needed = {settings.eos_token}
    if settings.adds_bos:
        needed.add(settings.bos_token)
    missing = [text for text in settings.named if tokenizer.token_to_id(text) is None]
    for text in missing:
        if text in needed:
            raise ModelUnsupported(
                f"{path / CONFIG_FILE} names the special token {text!r}, which {FILE} lacks; add "
                "it there, or correct the name",
                model=str(path),
            )
    if missing:
        logger.warning(
            "%s lacks special tokens that %s names, and splits them like other text: %s",
            path / FILE,
            CONFIG_FILE,
            ", ".join(map(repr, missing[:10])),
        )
