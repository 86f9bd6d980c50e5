"""Model files: where they are, and what tensors they hold, without loading any.

Neither MLX nor huggingface_hub is needed, which the base install does not have.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runner_client.errors import ModelNotFoundError, ModelUnsupportedError
from runner_common import safetensors
from runner_common.safetensors import HeaderError, Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["Tensor", "read_config", "read_header", "read_tensors", "resolve_model"]

_INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = frozenset((".bin", ".gguf", ".npz", ".pth", ".pt", ".safetensors"))
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_model(model: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Finds the directory of a model on this machine; never downloads.

    Args:
        model: A directory, or a hub id (``org/name``) in the local Hugging Face cache.
        environ: Where ``HF_HUB_CACHE``, ``HF_HOME`` and ``XDG_CACHE_HOME`` are looked up.

    Raises:
        ModelNotFoundError: Neither exists; the message says what was tried.
    """
    path = Path(model).expanduser() if model.startswith("~") else Path(model)
    kind = _kind(path) if model else None
    if kind == "directory":
        return path.resolve()
    if kind == "file":
        raise ModelNotFoundError(
            f"{model} is a file; name the directory that holds it and its config.json",
            model=model,
        )
    if not _HUB_ID.fullmatch(model):
        raise ModelNotFoundError(
            f"no model directory {model!r} (looked at {path.absolute()})", model=model
        )
    return _cached_snapshot(model, _hub_cache(environ))


def _kind(path: Path) -> Literal["directory", "file"] | None:
    try:
        if path.is_dir():
            return "directory"
        return "file" if path.exists() else None
    except OSError:
        # A name longer than the file system takes, or below a closed directory.
        return None


def _hub_cache(environ: Mapping[str, str]) -> Path:
    """The cache directory, by the rules of huggingface_hub."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(name):
            return Path(environ[name]).expanduser()
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = environ.get("HF_HOME") or f"{base}/huggingface"
    return Path(home).expanduser() / "hub"


def _cached_snapshot(model: str, cache: Path) -> Path:
    folder = cache / f"models--{model.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ModelNotFoundError(
            f"no model {model!r}: there is no such directory, and no {folder.name}/refs/main in "
            f"the Hugging Face cache {cache}. Download it first (hf download {model}), point "
            "HF_HUB_CACHE at the cache that has it, or name a directory",
            model=model,
        ) from error
    snapshot = folder / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        raise ModelNotFoundError(
            f"the Hugging Face cache {cache} names revision {commit!r} for {model} but does not "
            f"hold it; download it again (hf download {model})",
            model=model,
        )
    return snapshot


def read_config(directory: Path) -> dict[str, Any]:
    """The model's ``config.json``.

    Raises:
        ModelUnsupportedError: It is missing or no JSON object.
    """
    return _read_json_object(directory / "config.json")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model by name, from its ``model*.safetensors``.

    Those are the files that mlx_lm loads; an index, where there is one, must not
    name others.

    Raises:
        ModelUnsupportedError: There is none, a shard is missing, or a file is
            damaged; the message names the file.
    """
    files = {path.name: path for path in sorted(directory.glob("model*.safetensors"))}
    _check_index(directory, files)
    if not files:
        others = sorted(p.name for p in directory.glob("*") if p.suffix in _OTHER_FORMATS)
        found = f" (only {', '.join(others[:3])}: convert it with mlx_lm.convert)" if others else ""
        raise ModelUnsupportedError(f"no model*.safetensors in {directory}{found}")
    tensors: dict[str, Tensor] = {}
    for path in files.values():
        tensors.update((tensor.name, tensor) for tensor in read_header(path))
    return tensors


def _check_index(directory: Path, files: Iterable[str]) -> None:
    index = directory / _INDEX
    if not index.exists():
        return
    named = _read_json_object(index).get("weight_map")
    if not isinstance(named, dict):
        raise ModelUnsupportedError(f"{index}: no weight_map in it")
    missing = sorted({str(name) for name in named.values()} - set(files))
    if missing:
        raise ModelUnsupportedError(
            f"{directory}: {_INDEX} names {len(missing)} file(s) that are not there, first "
            f"{missing[0]}; finish the download, or copy the missing shards"
        )


def read_header(path: Path) -> tuple[Tensor, ...]:
    """The tensors that one file's header describes, in the order of their bytes.

    Raises:
        ModelUnsupportedError: The file is cut short, or its header is not true.
    """
    try:
        return safetensors.read_header(path)
    except HeaderError as error:
        raise ModelUnsupportedError(str(error)) from error


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelUnsupportedError(
            f"no {path.name} in {path.parent}: not a model directory, or not downloaded whole"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelUnsupportedError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelUnsupportedError(f"{path} is no JSON object")
    return content
