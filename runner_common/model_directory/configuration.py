"""Validation of a model's configuration and normalization for mlx_lm.

``config.json`` has several forms: transformers 5 writes ``rope_parameters`` instead of the
``rope_theta`` and ``rope_scaling`` of transformers 4, and mlx_lm reads settings by name and drops
all others silently. The normalized configuration has each setting under all of its names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from runner_common.contract import DEFAULT_CONTEXT_LENGTH
from runner_common.model_directory.aliases import with_aliases
from runner_common.model_directory.errors import ModelUnusableError
from runner_common.model_directory.json_files import read_object
from runner_common.model_directory.output_head import is_headless, with_output_head
from runner_common.model_directory.rope import context_factor, with_one_rope
from runner_common.model_directory.settings import wrong_setting
from runner_common.model_directory.weight_files import StoredTensor

_MIN_CONTEXT, _MAX_CONTEXT = 2, 2**31 - 1
_MAX_LAYERS = 2048
"""More than ten times the layers of the deepest models. mlx_lm builds all layers before it looks
for weights, so an absurd number would take indefinitely."""

_MAX_TOKEN_ID = 2**31 - 1

_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
_LAYER_NAMES = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
CONFIG, _GENERATION = "config.json", "generation_config.json"
_QUANTIZATION = "hf_quant_config.json"
"""File of NVIDIA's ModelOpt in place of ``quantization_config`` in config.json."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """Description of a model by its files other than the weights.

    Attributes:
        values: Normalized ``config.json`` for mlx_lm, with each setting under all of its names.
        model_type: Name of the architecture.
        eos_token_ids: Token ids that end a text, from all files together.
        context_length: Longest sequence that the model supports, in tokens.
        notes: Contradictions between the files and how they were resolved.
        has_output_layer: Whether the model can complete texts; False for a model that only embeds.
    """

    values: dict[str, Any]
    model_type: str
    eos_token_ids: frozenset[int]
    context_length: int
    notes: tuple[str, ...] = ()
    has_output_layer: bool = True


def read_configuration(
    directory: Path,
    stored: Mapping[str, Any],
    tensors: Mapping[str, StoredTensor],
    indexed: frozenset[str],
    *,
    embeds: bool = False,
) -> Configuration:
    """Validate and normalize a model's configuration.

    Args:
        directory: The model's directory.
        stored: Content of its ``config.json``.
        tensors: Tensors of its weight files.
        indexed: Names of the tensors in the index, if any.
        embeds: Whether the model embeds texts, for which it needs no output layer.

    Raises:
        ModelUnusableError: A file cannot be read, asks to run code, or has an impossible value.
            The message names the file and the key.
    """
    file = directory / CONFIG
    model_type = _model_type(file, stored)
    _require_built_in(file, stored)
    _require_depth(file, stored)
    if problem := wrong_setting(stored):
        raise _error(file, problem)
    ends = _eos_token_ids(directory, file, stored)
    has_output_layer = not (embeds and is_headless(stored, tensors, indexed))
    values = _in_one_form(stored)
    values, notes = with_output_head(values, tensors, indexed, has_head=has_output_layer)
    if "quantization_config" not in values and (directory / _QUANTIZATION).exists():
        values["quantization_config"] = read_object(directory / _QUANTIZATION)
    if ends:
        values["eos_token_id"] = sorted(ends)
    context = _context_length(file, values)
    return Configuration(values, model_type, ends, context, notes, has_output_layer)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the language model."""
    part = config.get("text_config")
    return part if isinstance(part, dict) and part else config


def _in_one_form(stored: Mapping[str, Any]) -> dict[str, Any]:
    text = text_part(stored)
    if text is stored:
        return with_aliases(with_one_rope(stored))
    return {**with_one_rope(stored), "text_config": with_aliases(with_one_rope(text))}


def _error(file: Path, what: str) -> ModelUnusableError:
    return ModelUnusableError(f"{file}: {what}", str(file.parent))


def _model_type(file: Path, stored: Mapping[str, Any]) -> str:
    found = stored.get("model_type")
    if not isinstance(found, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", found):
        raise _error(file, f"{found!r} is not a model_type; expected the configuration of a model")
    return found


def _require_built_in(file: Path, stored: Mapping[str, Any]) -> None:
    if stored.get("model_file") is not None:
        raise _error(
            file,
            f"asks to run {stored['model_file']!r} from the model's directory; this runner never "
            "runs code that comes with a model; use a model of a built-in architecture",
        )


def _require_depth(file: Path, stored: Mapping[str, Any]) -> None:
    for key, value in _values(stored, _LAYER_NAMES):
        if isinstance(value, int) and not 0 <= value <= _MAX_LAYERS:
            raise _error(file, f"{key} is {value}; a model has at most {_MAX_LAYERS} layers")


def _context_length(file: Path, values: Mapping[str, Any]) -> int:
    key, found = next(_values(values, _CONTEXT_NAMES), ("", DEFAULT_CONTEXT_LENGTH))
    if not _is_count(found) or not _MIN_CONTEXT <= found <= _MAX_CONTEXT:
        raise _error(file, f"{key} is {found!r}, which is not a context length in tokens")
    return int(min(found * context_factor(text_part(values), found), _MAX_CONTEXT))


def _values(config: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield names and values of the settings that are set, those of the text part first."""
    parts = [config] if text_part(config) is config else [text_part(config), config]
    for part in parts:
        yield from ((name, part[name]) for name in names if part.get(name) is not None)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _eos_token_ids(directory: Path, file: Path, stored: Mapping[str, Any]) -> frozenset[int]:
    """Return the ids of all files together, because each file tends to lack some."""
    found = _ids(file, "eos_token_id", stored.get("eos_token_id"))
    if text_part(stored) is not stored:
        found |= _ids(file, "text_config.eos_token_id", text_part(stored).get("eos_token_id"))
    generation = directory / _GENERATION
    if generation.exists():
        found |= _ids(generation, "eos_token_id", read_object(generation).get("eos_token_id"))
    return found


def _ids(file: Path, key: str, value: object) -> frozenset[int]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for id_ in ids:
        if not _is_count(id_) or not 0 <= id_ <= _MAX_TOKEN_ID:
            raise _error(file, f"{key} has {id_!r}, which is not a token id")
    return frozenset(ids)
