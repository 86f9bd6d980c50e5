"""Check of the files in a model's directory before any of them is opened."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterator
from pathlib import Path

from runner_common.model_directory.errors import ModelUnusableError
from runner_common.units import format_bytes

MAX_TEXT_BYTES = 256 * 2**20
"""Largest file that is read as a whole. The largest tokenizers have a tenth of this size."""

_READ_WHOLE = frozenset({".jinja", ".json", ".model", ".txt"})
_NEEDED = frozenset(("config.json", "generation_config.json", "tokenizer.json"))
"""Files whose broken links are refused; their absence would be silent, or mislead."""

_TEMPLATES = "additional_chat_templates"
_MODULES = "[0-9]_*"
"""Folders of sentence-transformers."""

_COUNTED = re.compile(
    r"[^/]+\.(json|jinja|model|tiktoken)|(vocab|merges)[^/]*\.txt"
    rf"|{_TEMPLATES}/[^/]+\.jinja|[0-9]_[^/]*/config\.json"
)
_UNCOUNTED = re.compile(r"(?<!\.safetensors)\.index\.json$")
"""Indices of weights in other formats."""


def counts_beside_weights(name: str) -> bool:
    """Return whether a file can matter to a model, apart from weights.

    Args:
        name: Path of the file within the model's directory, with ``/``.
    """
    return bool(_COUNTED.fullmatch(name)) and not _UNCOUNTED.search(name)


def require_files(path: Path) -> None:
    """Check the entries of a model's directory without opening them.

    Reading a pipe would block indefinitely, and reading a device such as ``/dev/zero`` would
    fill the memory. A link may lead to either.

    Raises:
        ModelUnusableError: An entry is not a regular file, is too large to be read as a whole, or
            is a broken link in place of a needed file.
    """
    for entry in _entries(path):
        try:
            found = entry.stat()
        except OSError as error:  # a broken or circular link
            if entry.name in _NEEDED:
                raise ModelUnusableError(
                    f"{entry} is a broken link: finish the download", str(path)
                ) from error
            continue
        if stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise ModelUnusableError(
                f"{entry} is not a file but a device, a pipe or a socket", str(path)
            )
        if entry.suffix in _READ_WHOLE and found.st_size > MAX_TEXT_BYTES:
            raise ModelUnusableError(
                f"{entry} has {format_bytes(found.st_size)}; at most "
                f"{format_bytes(MAX_TEXT_BYTES)} are read",
                str(path),
            )


def _entries(path: Path) -> Iterator[Path]:
    for folder in (path, path / _TEMPLATES, *path.glob(_MODULES)):
        if folder.is_dir():
            yield from folder.iterdir()
