"""What a model's directory says of itself, looked at before anything is built from it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from runner_common.safetensors import HeaderError, read_header
from runner_server.adapter.names import load_config
from runner_server.errors import ModelUnsupported

DEFAULT_CONTEXT = 4096
_MIN_CONTEXT, _MAX_CONTEXT = 2, 2**31 - 1
_MAX_LAYERS = 2048
"""More than ten times what the deepest models have. Each layer is built before its weights
are looked for, so that a config.json with absurdly many would take for ever."""

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_LAYER_NAMES = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")


def read_config(path: Path) -> dict[str, Any]:
    """Reads config.json.

    Raises:
        ModelUnsupported: There is none, it is none, asks to run code, or is absurd.
    """
    file = path / "config.json"
    if not file.exists():
        raise ModelUnsupported(
            f"no config.json in {path}: no model's directory, or not downloaded whole"
        )
    try:
        config: dict[str, Any] = load_config(path)
        model_type = config["model_type"]
    # ValueError: no JSON, no UTF-8, or a number of thousands of digits.
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelUnsupported(
            f"{file} cannot be used ({type(error).__name__}: {error}); expected the configuration "
            "of a model, with its model_type",
            model=str(path),
        ) from error
    if config.get("model_file") is not None:
        raise ModelUnsupported(
            f"{file} asks to run {config['model_file']!r} from the model's directory; this runner "
            "never runs code that comes with a model; use a model of a built-in architecture",
            model=str(path),
        )
    if not re.fullmatch(r"[A-Za-z0-9_-]+", str(model_type)):
        raise ModelUnsupported(f"{file}: {model_type!r} is no model_type", model=str(path))
    _check_depth(file, config)
    return config


def _check_depth(file: Path, config: dict[str, Any]) -> None:
    for value in _values(config, _LAYER_NAMES):
        if isinstance(value, int) and not 0 <= value <= _MAX_LAYERS:
            raise ModelUnsupported(
                f"{file}: {value} layers; a model has at most {_MAX_LAYERS}", model=str(file.parent)
            )


def max_context(config: dict[str, Any]) -> int:
    """The longest sequence that a configuration allows, in tokens.

    Raises:
        ModelUnsupported: What it says is no number of tokens.
    """
    value = next(iter(_values(config, _CONTEXT_NAMES)), DEFAULT_CONTEXT)
    if not isinstance(value, int) or not _MIN_CONTEXT <= value <= _MAX_CONTEXT:
        raise ModelUnsupported(f"config.json: {value!r} is no number of tokens for a context")
    return value


def _values(config: dict[str, Any], names: tuple[str, ...]) -> list[object]:
    """What stands under any of the names, in it or in its part about text."""
    text = config.get("text_config")
    parts = [config, text] if isinstance(text, dict) else [config]
    values = [part.get(name) for part in parts for name in names]
    return [value for value in values if value is not None]


def damage(path: Path) -> str | None:
    """Looks for the file that keeps a model from being built.

    Returns:
        What is wrong with which of the weight files, in words; None if each by itself
        can be read.
    """
    missing = _missing(path)
    if missing:
        return f"{missing[0]} is missing" + f", and {len(missing) - 1} more" * (len(missing) > 1)
    for file in sorted(path.glob("model*.safetensors")):
        try:
            read_header(file)
        except HeaderError as error:
            return str(error)
    return None


def _missing(path: Path) -> list[str]:
    """The files that the index names and that are not there."""
    try:
        index = json.loads((path / "model.safetensors.index.json").read_bytes())
        names = {str(name) for name in index["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return sorted(name for name in names if not (path / name).exists())
