"""Refuses a model's directory whose files are not what reading them takes for granted."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from runner_common.model_directory.errors import ModelUnusableError
from runner_common.units import format_bytes

_MAX_TEXT_BYTES = 256 * 2**20
"""Of a file that is read into memory whole; the largest tokenizers have a tenth of it."""

_READ_WHOLE = frozenset({".jinja", ".json", ".model", ".txt"})
_NEEDED = frozenset(("config.json", "generation_config.json", "tokenizer.json"))
"""Files that would be missed in silence, or by an error that says something else."""

_TEMPLATES = "additional_chat_templates"


def require_files(path: Path) -> None:
    """Looks at what lies in a model's directory, and opens none of it.

    A pipe would be waited for without end, and a device such as ``/dev/zero`` read until
    all memory is taken; either may be behind a link.

    Raises:
        ModelUnusableError: Something is no file, or too large to be read whole.
    """
    for entry in _entries(path):
        try:
            found = entry.stat()
        except OSError as error:  # a link to nothing, or a ring
            if entry.name in _NEEDED:
                raise ModelUnusableError(
                    f"{entry} is a link to nothing: finish the download", str(path)
                ) from error
            continue
        if stat.S_ISDIR(found.st_mode):
            continue
        if not stat.S_ISREG(found.st_mode):
            raise ModelUnusableError(
                f"{entry} is not a file but a device, a pipe or a socket", str(path)
            )
        if entry.suffix in _READ_WHOLE and found.st_size > _MAX_TEXT_BYTES:
            raise ModelUnusableError(
                f"{entry} has {format_bytes(found.st_size)}; at most "
                f"{format_bytes(_MAX_TEXT_BYTES)} are read",
                str(path),
            )


def _entries(path: Path) -> Iterator[Path]:
    for folder in (path, path / _TEMPLATES):
        if folder.is_dir():
            yield from folder.iterdir()
