"""Where a model lies: a directory, or a hub id in the local cache. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from runner_server.errors import ModelNotFound
from runner_server.model_root import ModelRoot


def find_below(root: ModelRoot, model: str) -> Path:
    """Finds a model, and tells nothing of what lies elsewhere: not even whether it exists."""
    fault = ModelNotFound(
        f"no model at {model!r}: this runner opens only directories below the one that it was "
        "started with as --model-root, and hub ids whose local cache is below it; links that lead "
        "out of it count as outside",
        model=model,
    )
    try:
        path = find(model).resolve()
        if root.has(path):
            return path
    except (ModelNotFound, OSError, RuntimeError) as error:  # RuntimeError: links in a ring
        raise fault from error
    raise fault


def find(model: str) -> Path:
    """Finds a model.

    Raises:
        ModelNotFound: It is neither a directory nor a hub id in the local cache.
    """
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            return path.resolve()
        return _find_in_cache(model)
    # OSError: not in the cache, or a name too long for this file system; ValueError: no
    # hub id; RuntimeError: "~name" of nobody.
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelNotFound(
            f"no model at {model!r}: it is no directory here and no hub id in the local Hugging "
            "Face cache; give a directory that exists on this machine, or download the model first "
            "(nothing is downloaded by this process)",
            model=model,
        ) from error


def _find_in_cache(model: str) -> Path:
    # It takes a quarter of a second, which a directory's name need not wait for.
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - for that

    return Path(snapshot_download(model, local_files_only=True))
