"""JSON files of a model's directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from runner_common.model_directory.errors import ModelUnusableError

_LFS_MARK = b"version https://git-lfs.github.com/spec/"

# transformers writes infinities and NaN, which JSON lacks, in this form.
_TAG = "__float__"
_TAGGED = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def is_lfs_pointer(file: Path) -> bool:
    """Return whether a file is a Git LFS pointer, left in place of a file not fetched yet.

    Raises:
        OSError: The file cannot be read.
    """
    with file.open("rb") as opened:
        return opened.read(len(_LFS_MARK)) == _LFS_MARK


def lfs_error(file: Path) -> ModelUnusableError:
    """Return the error for a Git LFS pointer."""
    return ModelUnusableError(
        f"{file} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull` in the "
        "repository, or download the model with `mlx-runner pull`",
        str(file.parent),
    )


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file, which may begin with a byte order mark.

    Raises:
        ModelUnusableError: The file is missing, cannot be read, or is not a JSON object.
    """
    content = _read(file)
    if not isinstance(content, dict):
        raise ModelUnusableError(f"{file} is not a JSON object", str(file.parent))
    return content


def read_list(file: Path) -> list[Any]:
    """Return the JSON array in a file; raise as :func:`read_object`."""
    content = _read(file)
    if not isinstance(content, list):
        raise ModelUnusableError(f"{file} is not a JSON array", str(file.parent))
    return content


def _read(file: Path) -> object:
    try:
        if file.exists() and not file.is_file():
            raise ModelUnusableError(f"{file} is not a file", str(file.parent))
        data = file.read_bytes()
        if data.startswith(_LFS_MARK):
            raise lfs_error(file)
        # From bytes, because json then handles a byte order mark.
        content = _untagged(json.loads(data))
        # Fails for a lone surrogate, which no message could carry.
        json.dumps(content, ensure_ascii=False).encode()
    except FileNotFoundError as error:
        raise ModelUnusableError(
            f"no {file.name} in {file.parent}: not a model directory, or an incomplete download",
            str(file.parent),
        ) from error
    # ValueError: invalid JSON or Unicode, or a number with thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnusableError(f"{file} cannot be read: {error}", str(file.parent)) from error
    return content


def _untagged(value: object) -> object:
    if isinstance(value, list):
        return [_untagged(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_TAG} and isinstance(value[_TAG], str) and value[_TAG] in _TAGGED:
        return _TAGGED[value[_TAG]]
    return {key: _untagged(item) for key, item in value.items()}
