"""Where a model lies: a directory, or a hub id in the local cache. Nothing is downloaded."""

from __future__ import annotations

from runner_common.model_directory import Located, ModelMissingError, locate
from runner_server.errors import ModelNotFound
from runner_server.host.model_root import ModelRoot


def find_model(model: str, root: ModelRoot | None) -> Located:
    """Find a model, below the root if there is one.

    Raises:
        ModelNotFound: It is neither a directory nor a hub id in the local cache, or outside of
            the root.
    """
    return _find_below(root, model) if root else _find(model)


def _find_below(root: ModelRoot, model: str) -> Located:
    """Find a model, and tell nothing of what lies elsewhere: not even whether it exists."""
    fault = ModelNotFound(
        f"no model at {model!r}: this runner opens only directories below the one that it was "
        "started with as --model-root, and hub ids whose local cache is below it; links that lead "
        "out of it count as outside",
        model=model,
    )
    try:
        located = _find(model)
        if root.has(located.path):
            return located
    except (ModelNotFound, OSError, RuntimeError) as error:  # RuntimeError: links in a ring
        raise fault from error
    raise fault


def _find(model: str) -> Located:
    try:
        return locate(model)
    except ModelMissingError as error:
        raise ModelNotFound(
            f"{error}; nothing is downloaded by this process", model=model
        ) from error
