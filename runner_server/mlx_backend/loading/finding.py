"""Resolution of a model's name, a path or a hub id in the local cache, to a directory."""

from __future__ import annotations

from runner_common.model_directory import Located, ModelMissingError, locate
from runner_server.errors import ModelNotFound
from runner_server.host.model_root import ModelRoot


def find_model(model: str, root: ModelRoot | None) -> Located:
    """Find a model's directory, which must be below the root if there is one. Downloads nothing.

    Raises:
        ModelNotFound: The name is neither a directory nor a hub id in the local cache, or the
            directory is outside the root.
    """
    return _find_below(root, model) if root else _find(model)


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
