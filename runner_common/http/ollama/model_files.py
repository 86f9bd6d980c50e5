"""Descriptions of models by their files."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner_common.model_directory import ModelUnusableError, read_model_directory, text_part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from runner_common.model_directory import ModelDirectory

_TEMPLATE = "chat_template.jinja"
_TEMPLATE_SOURCES = ("tokenizer_config.json", "chat_template.json")
_MAX_TEMPLATE_BYTES = 4 * 2**20
_HIDDEN_SIZES = ("hidden_size", "n_embd", "d_model", "dim")
_LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KV_HEADS = ("num_key_value_heads", "n_kv_heads")
_MIXED_GROUP = 64
"""Weights that share a scale, unless the configuration says otherwise."""

_REMEMBERED = 64


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Facts about a model from the files.

    Attributes:
        size_bytes: Size of all files.
        modified_at: When the newest file was modified.
        digest: SHA-256 of the names, sizes and times of the files: changes with the files.
        family: ``model_type`` of the configuration.
        parameter_count: Number of weights.
        quantization: Format of most weights, such as ``F16`` or ``int4``.
        context_length: Longest sequence that the model supports, in tokens.
        sizes: Sizes of its parts, as in GGUF without the prefix of the architecture.
        template: Source of the chat template; empty if there is none.
        completes: Whether it completes texts.
        embeds: Whether it embeds texts.
    """

    size_bytes: int
    modified_at: str
    digest: str
    family: str
    parameter_count: int
    quantization: str
    context_length: int
    sizes: Mapping[str, int]
    template: str
    completes: bool
    embeds: bool


def describe_files(path: str) -> ModelFiles | None:
    """Read a model's directory; return None for an unusable one.

    Blocks for as long as the headers of the weights take to read, unless the files are those of an
    earlier call.
    """
    try:
        listing = tuple(
            (str(file.relative_to(path)), stat.st_size, stat.st_mtime_ns)
            for file in sorted(Path(path).iterdir())
            if file.is_file() and (stat := file.stat())
        )
        return _described(path, listing)
    except (OSError, ModelUnusableError):
        return None


@lru_cache(maxsize=_REMEMBERED)
def _described(path: str, listing: tuple[tuple[str, int, int], ...]) -> ModelFiles:
    found = read_model_directory(Path(path))
    config = text_part(found.configuration.values)
    newest = max(nanoseconds for *_, nanoseconds in listing) / 1e9
    return ModelFiles(
        size_bytes=sum(size for _, size, _ in listing),
        modified_at=datetime.fromtimestamp(newest, UTC).isoformat(),
        digest=hashlib.sha256(json.dumps(listing).encode()).hexdigest(),
        family=found.configuration.model_type,
        parameter_count=_parameter_count(found),
        quantization=_quantization(found),
        context_length=found.configuration.context_length,
        sizes=_sizes(config),
        template=_template(Path(path)),
        completes=found.configuration.has_output_layer,
        embeds=not found.embedding.problem,
    )


def _quantized(found: ModelDirectory) -> Mapping[str, Any]:
    config = found.configuration.values
    settings = config.get("quantization") or config.get("quantization_config")
    return settings if isinstance(settings, dict) else {}


def _parameter_count(found: ModelDirectory) -> int:
    """Count weights, with the packed ones of quantized layers and without scales."""
    settings, count = _quantized(found), 0
    for name, stored in found.tensors.items():
        layer, _, part = name.rpartition(".")
        scales = found.tensors.get(f"{layer}.scales")
        if scales is None:
            count += stored.tensor.size
        elif part == "weight":
            own = settings.get(layer)
            group = (own if isinstance(own, dict) else settings).get("group_size", _MIXED_GROUP)
            count += scales.tensor.size * group
        elif part == "bias":
            count += stored.tensor.size
    return count


def _quantization(found: ModelDirectory) -> str:
    settings = _quantized(found)
    if isinstance(mode := settings.get("mode"), str) and mode != "affine":
        return mode
    if isinstance(bits := settings.get("bits"), int):
        return f"int{bits}"
    sizes: Counter[str] = Counter()
    for stored in found.tensors.values():
        sizes[stored.tensor.dtype] += math.prod(stored.tensor.shape)
    return sizes.most_common(1)[0][0] if sizes else ""


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    named = {
        "embedding_length": _HIDDEN_SIZES,
        "block_count": _LAYERS,
        "attention.head_count": _HEADS,
        "attention.head_count_kv": _KV_HEADS,
        "vocab_size": ("vocab_size",),
    }
    found: dict[str, int] = {}
    for name, keys in named.items():
        values = (config.get(key) for key in keys)
        value = next((each for each in values if isinstance(each, int)), None)
        if value is not None:
            found[name] = value
    return found


def _template(path: Path) -> str:
    """Return the source of the chat template, or of the default one of several."""
    try:
        if (path / _TEMPLATE).is_file():
            return _read(path / _TEMPLATE)
        for name in _TEMPLATE_SOURCES:
            if (path / name).is_file():
                source = json.loads(_read(path / name)).get("chat_template")
                if source:
                    return _default_of(source)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, RecursionError):
        pass
    return ""


def _read(file: Path) -> str:
    if file.stat().st_size > _MAX_TEMPLATE_BYTES:
        return ""
    return file.read_text(encoding="utf-8")


def _default_of(source: Any) -> str:  # noqa: ANN401 - JSON
    if isinstance(source, str):
        return source
    named = {each["name"]: each["template"] for each in source}
    return str(named.get("default", ""))
