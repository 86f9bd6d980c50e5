"""What a gateway wants to know of a model that only its files say: tokenizer, special tokens."""

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

# What the gateway's own list of tokenizer files has, less those for pictures and sound.
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
"""The gateway refuses an archive with more."""


@dataclass(frozen=True)
class SpecialTokens:
    """What ``config.json`` says beside what the engine knows.

    Attributes:
        architectures: The names of its classes in transformers.
        bos_token_id: 0 where there is none, as the gateway's protocol has it.
        pad_token_id: The same.
    """

    architectures: tuple[str, ...] = ()
    bos_token_id: int = 0
    pad_token_id: int = 0


def special_tokens(directory: Path) -> SpecialTokens:
    """Reads ``config.json``; nothing is known if it is gone since the model was loaded."""
    try:
        config: dict[str, Any] = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        logger.warning("nothing of %s/config.json can be told: %s", directory, error)
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
    # Some configurations have -1 for none, or a list.
    return value if isinstance(value, int) and 0 <= value < _MAX_TOKEN_ID else 0


def tokenizer_archive(directory: Path) -> bytes:
    """A ZIP archive of the tokenizer's files; the same bytes for the same files.

    Raises:
        GenerationFailed: They cannot be read any more.
    """
    files = _files(directory)[:_MAX_FILES]
    if not files:
        raise _gone(directory, "there are none")
    data = io.BytesIO()
    try:
        with zipfile.ZipFile(data, "w") as archive:
            for path in files:
                # A ZipInfo of its own has a fixed date in it, not the file's.
                entry = zipfile.ZipInfo(path.name)
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise _gone(directory, str(error)) from error
    return data.getvalue()


def _gone(directory: Path, problem: str) -> GenerationFailed:
    return GenerationFailed(
        f"the tokenizer's files in {directory} cannot be read ({problem}); they were there when "
        "the model was loaded: put them back, or load it from where they are"
    )


def _files(directory: Path) -> list[Path]:
    named = [directory / name for name in _NAMES]
    others = [path for pattern in _PATTERNS for path in sorted(directory.glob(pattern))]
    return [path for path in (*named, *others) if path.is_file()]
