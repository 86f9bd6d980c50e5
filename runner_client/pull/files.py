"""Files of a repository on the hub, and the selection for a runner."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from runner_client.errors import ModelUnsupportedError
from runner_common.model_directory import MAX_TEXT_BYTES, counts_beside_weights
from runner_common.units import format_bytes

if TYPE_CHECKING:
    from hashlib import _Hash

_CONFIG = "config.json"
_WEIGHTS = ".safetensors"
_ADAPTERS = frozenset(("adapters.safetensors", "adapter_model.safetensors"))
_OTHER_WEIGHTS = frozenset((".bin", ".gguf", ".npz", ".pth", ".pt"))

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        name: Path within the repository, with ``/``.
        size: Size in bytes.
        digest: SHA-256 of the content for a file in LFS, otherwise git's SHA-1 of the blob. It is
            also the file's name in the cache.
    """

    name: str
    size: int
    digest: str

    def hasher(self) -> _Hash:
        """Return a new hash object, whose digest of the whole content must equal ``digest``."""
        if len(self.digest) == hashlib.sha256().digest_size * 2:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)

    @property
    def has_valid_digest(self) -> bool:
        """Validity of the digest, which makes it safe as a file name."""
        return bool(_DIGEST.fullmatch(self.digest))


@dataclass(frozen=True, slots=True)
class Repository:
    """The content of a repository at one commit.

    Attributes:
        name: ``org/name``.
        commit: The commit.
        files: All files.
    """

    name: str
    commit: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True, slots=True)
class Candidates:
    """Files for a runner.

    Attributes:
        texts: Configuration, tokenizer and templates.
        weights: Files that may be the model's weights.
    """

    texts: tuple[RemoteFile, ...]
    weights: tuple[RemoteFile, ...]


def candidates(repository: Repository) -> Candidates:
    """Return the files of a repository for a runner.

    Raises:
        ModelUnsupportedError: The repository is not that of a model in safetensors, or a file
            that is read as a whole is too large.
    """
    files = [file for file in repository.files if _is_inside(file.name)]
    texts = tuple(file for file in files if counts_beside_weights(file.name))
    weights = tuple(file for file in files if _may_be_weights(file.name))
    if all(file.name != _CONFIG for file in texts):
        raise _unsupported(repository, f"it has no {_CONFIG}, so it is not a model's repository")
    if not weights:
        raise _unsupported(repository, f"it has no *{_WEIGHTS}{_others(files)}")
    for file in (*texts, *weights):
        if not file.has_valid_digest:
            raise _unsupported(repository, f"the hub gives no checksum of {file.name}")
    for file in texts:
        if file.size > MAX_TEXT_BYTES:
            size, limit = format_bytes(file.size), format_bytes(MAX_TEXT_BYTES)
            raise _unsupported(repository, f"{file.name} has {size}; at most {limit} are read")
    return Candidates(texts, weights)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _may_be_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS) and "/" not in name and name not in _ADAPTERS


def _others(files: list[RemoteFile]) -> str:
    others = [file.name for file in files if PurePosixPath(file.name).suffix in _OTHER_WEIGHTS]
    if not others:
        return ""
    return f" (only {', '.join(others[:3])}: look for a repository in MLX's format)"


def _unsupported(repository: Repository, what: str) -> ModelUnsupportedError:
    text = f"{repository.name} cannot be loaded: {what}"
    return ModelUnsupportedError(text, model=repository.name)
