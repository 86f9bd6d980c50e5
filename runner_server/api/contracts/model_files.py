"""Tokenizer files and special tokens of a model, read from disk for the gateway."""

from __future__ import annotations

import io
import json
import logging
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner_server.errors import GenerationFailed

logger = logging.getLogger(__name__)

# The gateway's own list of tokenizer files, without those for images and audio.
_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
)
_PATTERNS = ("*.jinja", "*.model", "*.tiktoken")

_MAX_TOKEN_ID = 2**31

_MAX_FILES = 50
"""The gateway refuses larger archives."""


@dataclass(frozen=True)
class SpecialTokens:
    """Values of ``config.json`` missing from ``ModelInfo``.

    Attributes:
        architectures: Names of the model's classes in transformers.
        bos_token_id: Beginning-of-text token; 0 for none, as the gateway's protocol requires.
        pad_token_id: Padding token; 0 for none.
    """

    architectures: tuple[str, ...] = ()
    bos_token_id: int = 0
    pad_token_id: int = 0


def special_tokens(directory: Path) -> SpecialTokens:
    """Read ``config.json``; return defaults if the file has disappeared or is invalid."""
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        logger.warning("cannot read the special tokens in %s/config.json: %s", directory, error)
        return SpecialTokens()
    return SpecialTokens(
        architectures=_names(config.get("architectures")),
        bos_token_id=_token_id(config.get("bos_token_id")),
        pad_token_id=_token_id(config.get("pad_token_id")),
    )


def _names(value: object) -> tuple[str, ...]:
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return tuple(name for name in listed if isinstance(name, str))


def _token_id(value: object) -> int:
    # Some configurations have a list, or -1 for none.
    return value if isinstance(value, int) and 0 <= value < _MAX_TOKEN_ID else 0


def tokenizer_archive(directory: Path) -> bytes:
    """Return a reproducible ZIP archive of the tokenizer's files.

    Raises:
        GenerationFailed: The files can no longer be read.
    """
    files = _files(directory)[:_MAX_FILES]
    if not files:
        raise _unreadable(directory, "none found")
    data = io.BytesIO()
    try:
        with zipfile.ZipFile(data, "w") as archive:
            for path in files:
                # A ZipInfo has a fixed date by default; the file's date would change the bytes.
                entry = zipfile.ZipInfo(path.name)
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise _unreadable(directory, str(error)) from error
    return data.getvalue()


def _unreadable(directory: Path, problem: str) -> GenerationFailed:
    return GenerationFailed(
        f"the tokenizer's files in {directory} cannot be read ({problem}); they existed when "
        "the model was loaded: restore them, or load the model from their new location"
    )


def _files(directory: Path) -> list[Path]:
    named = [directory / name for name in _NAMES]
    others = [path for pattern in _PATTERNS for path in sorted(directory.glob(pattern))]
    return [path for path in (*named, *others) if path.is_file()]
