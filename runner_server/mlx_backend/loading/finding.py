"""Resolution of a model's name, a path or a hub id in the local cache, to a directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runner_common.model_directory import (
    AdapterFiles,
    Located,
    ModelMissingError,
    ModelUnusableError,
    locate,
    read_adapter,
)
from runner_server.engine.adapters import AdapterSpec
from runner_server.errors import InvalidField, ModelNotFound, ModelUnsupported
from runner_server.host.model_root import ModelRoot


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter to attach.

    Attributes:
        name: The name by which requests select it.
        files: Its files.
    """

    name: str
    files: AdapterFiles


def find_model(model: str, root: ModelRoot | None) -> Located:
    """Find a model's directory, which must be below the root if there is one. Downloads nothing.

    Raises:
        ModelNotFound: The name is neither a directory nor a hub id in the local cache, or the
            directory is outside the root.
    """
    return _find_below(root, model) if root else _find(model)


def find_adapters(
    adapters: Sequence[AdapterSpec], root: ModelRoot | None = None
) -> tuple[NamedAdapter, ...]:
    """Find the directories of adapters, and read their files without the tensors.

    Raises:
        InvalidField: A directory does not exist, or is outside the root.
        ModelUnsupported: A file is missing or damaged, or an adapter is of another kind.
    """
    return tuple(_find_adapter(index, each, root) for index, each in enumerate(adapters))


def _find_adapter(index: int, adapter: AdapterSpec, root: ModelRoot | None) -> NamedAdapter:
    path = Path(adapter.path)
    try:
        is_there = path.is_dir() and (root is None or root.has(path.resolve()))
    except (OSError, RuntimeError):  # RuntimeError: symlink loop
        is_there = False
    if not is_there:
        below = " below its --model-root" if root else ""
        text = f"{adapter.path!r} is not a directory{below} on the machine of this runner"
        raise InvalidField([(f"adapters[{index}].path", text)])
    try:
        return NamedAdapter(adapter.name, read_adapter(path.absolute()))
    except ModelUnusableError as error:
        raise ModelUnsupported(str(error)) from error


def _find_below(root: ModelRoot, model: str) -> Located:
    """Find a model below the root.

    The error is the same for a missing model and for one outside the root, so that it does not
    reveal which directories exist.
    """
    fault = ModelNotFound(
        f"no model at {model!r}: this runner opens only directories below its --model-root, and "
        "hub ids whose local cache is below it; symlinks out of the root count as outside",
        model=model,
    )
    try:
        located = _find(model)
        if root.has(located.path):
            return located
    except (ModelNotFound, OSError, RuntimeError) as error:  # RuntimeError: symlink loop
        raise fault from error
    raise fault


def _find(model: str) -> Located:
    try:
        return locate(model)
    except ModelMissingError as error:
        raise ModelNotFound(f"{error}; this process downloads nothing", model=model) from error
