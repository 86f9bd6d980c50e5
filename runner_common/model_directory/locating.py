"""Resolution of model names to directories: paths, or hub ids in the local cache.

Follows the layout and variables of huggingface_hub, which the base install does not include; see
https://huggingface.co/docs/huggingface_hub/guides/manage-cache. Nothing is downloaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runner_common.model_directory.entries import require_files
from runner_common.model_directory.errors import ModelMissingError, ModelUnusableError
from runner_common.model_directory.weight_files import choose_weight_files

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?)(@(?P<revision>[^\0]+))?")
_VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})", re.ASCII)
_MAIN = "main"
_TOKENIZER_FILES = ("*token*.json", "*.model", "vocab*", "*.tiktoken", "tekken.json")


@dataclass(frozen=True, slots=True)
class Located:
    """Location of a model.

    Attributes:
        path: The directory, absolute and with links resolved.
        is_hub_id: Whether the name is a hub id rather than a path.
        note: Why another snapshot than that of ``refs/main`` was chosen; otherwise empty.
    """

    path: Path
    is_hub_id: bool = False
    note: str = ""


def locate(model: str, environ: Mapping[str, str] = os.environ) -> Located:
    """Find a model on this machine.

    Args:
        model: A directory, in which ``~`` is a home directory, or a hub id: ``org/name`` or
            ``org/name@revision``, with a branch, a tag or a commit as the revision.
        environ: Environment of the process that will load the model.

    Raises:
        ModelMissingError: The model was not found; the message lists the places searched.
    """
    path = _expanded(model, environ)
    kind = _kind(path) if model else None
    if kind == "directory":
        return Located(path.resolve())
    if kind == "file":
        raise ModelMissingError(
            f"{model} is a file; name the directory that holds it and its config.json", model
        )
    match = _HUB_ID.fullmatch(model)
    if not match:
        raise ModelMissingError(
            f"no model at {model!r}: there is no such directory (looked at "
            f"{str(path.absolute())!r}), and it is not a hub id (org/name)",
            model,
        )
    repository = _Repository(model, match["id"], hub_cache(environ))
    return repository.snapshot(match["revision"])


def _expanded(model: str, environ: Mapping[str, str]) -> Path:
    """Expand ``~`` by the given environment; keep the name of an unknown user unchanged."""
    if model == "~" or model.startswith("~/"):
        home = environ.get("HOME") or str(Path.home())
        return Path(home + model[1:])
    try:
        return Path(model).expanduser()
    except RuntimeError:  # an unknown user, but perhaps a directory of that name
        return Path(model)


def _kind(path: Path) -> Literal["directory", "file"] | None:
    try:
        if path.is_dir():
            return "directory"
        return "file" if path.exists() else None
    # The name is too long for the file system, is in an unreadable directory, or contains NUL.
    except (OSError, ValueError):
        return None


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Return the cache directory, by the rules of huggingface_hub."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return _with_variables(environ[name], environ)
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{base}/huggingface"
    return _with_variables(home, environ) / "hub"


def _with_variables(path: str, environ: Mapping[str, str]) -> Path:
    """Expand ``~``, then ``$NAME`` and ``${NAME}``, like ``os.path`` but from ``environ``."""

    def value(match: re.Match[str]) -> str:
        return environ.get(match[1].strip("{}"), match[0])

    return Path(_VARIABLE.sub(value, str(_expanded(path, environ)))).absolute()


class _Repository:
    """A model's folder in the cache.

    Args:
        model: The requested name.
        hub_id: The name without a revision.
        cache: The cache directory.
    """

    def __init__(self, model: str, hub_id: str, cache: Path) -> None:
        self._model = model
        self._id = hub_id
        self._cache = cache
        self._folder = cache / f"models--{hub_id.replace('/', '--')}"

    def snapshot(self, revision: str | None) -> Located:
        """Return the snapshot of a revision; by default that of main, or else a complete one.

        Raises:
            ModelMissingError: The cache has no such snapshot.
        """
        if _kind(self._folder) != "directory":
            raise self._missing(f"no {self._folder.name} in")
        commit = self._commit(revision or _MAIN)
        path = self._folder / "snapshots" / commit if commit else None
        if path and _kind(path) == "directory" and (revision or is_complete(path)):
            return Located(path.resolve(), is_hub_id=True)
        others = self._complete()
        if revision is None and others:
            return self._instead(others[0], path)
        if path and _kind(path) == "directory":
            return Located(path.resolve(), is_hub_id=True)
        wanted = f"revision {revision}" if revision else f"refs/main ({commit or 'missing'})"
        has = f" (it has {', '.join(other.name for other in others)})" if others else ""
        raise self._missing(f"no snapshot of {wanted}{has} in")

    def _instead(self, found: Path, path: Path | None) -> Located:
        why = f"{path.name}, which refs/main names, is not complete" if path else "no refs/main"
        note = f"{self._id}: {why} in {self._folder}; using the complete snapshot {found.name}"
        return Located(found.resolve(), is_hub_id=True, note=note)

    def _commit(self, revision: str) -> str | None:
        """Return the commit of a branch, tag or commit name; None if unknown."""
        refs, snapshots = self._folder / "refs", self._folder / "snapshots"
        if not (_is_inside(revision, refs) and _is_inside(revision, snapshots)):
            return None
        try:
            commit = (refs / revision).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return revision if _kind(snapshots / revision) == "directory" else None
        return commit if commit and _is_inside(commit, snapshots) else None

    def _complete(self) -> list[Path]:
        """Return the complete snapshots, newest first."""
        try:
            found = [path for path in (self._folder / "snapshots").iterdir() if is_complete(path)]
            return sorted(found, key=lambda path: (-path.stat().st_mtime, path.name))
        except OSError:
            return []

    def _missing(self, what: str) -> ModelMissingError:
        return ModelMissingError(
            f"no model at {self._model!r}: there is no such directory, and {what} the Hugging Face "
            f"cache {self._cache}. Download it first (mlx-runner pull {self._id}), point "
            "HF_HUB_CACHE at the cache that has it, or name a directory",
            self._model,
        )


def _is_inside(name: str, folder: Path) -> bool:
    return folder in Path(os.path.normpath(folder / name)).parents


def is_complete(path: Path) -> bool:
    """Return whether a directory has a configuration, a tokenizer and every weight file."""
    try:
        require_files(path)
        has_tokenizer = any(
            file.is_file() for pattern in _TOKENIZER_FILES for file in path.glob(pattern)
        )
        has_config = (path / "config.json").is_file()
        return has_config and has_tokenizer and bool(choose_weight_files(path).files)
    except (ModelUnusableError, OSError):
        return False
