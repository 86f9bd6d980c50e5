"""Model directories with tiny random models."""

from __future__ import annotations

import contextlib
import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tools.memory.catalog import CONFIGS

_SEED = 0
_GROUP_SIZE = 64

_NOISE = 0.02
"""Noise added to each weight: weights initialized to zero would leave layers without effect."""

_HEADS = ("lm_head", "embed_out")

_END_TOKEN = "<eos>"  # noqa: S105
_NEVER_IN_UTF8 = (0xC0, 0xC1, *range(0xF5, 0x100))


def scaled(model_type: str, **overrides: Any) -> dict[str, Any]:
    """Return a configuration of the catalog with other sizes.

    Args:
        model_type: A key of ``CONFIGS``.
        overrides: Settings to change wherever the type has them: at the top level, in
            ``text_config``, or both. A dict changes only the settings it names.

    Returns:
        A deep copy, safe to change.

    Raises:
        KeyError: The type is not in the catalog, or has no setting of that name.
    """
    config = copy.deepcopy(CONFIGS[model_type])
    for name, value in overrides.items():
        holders = [part for part in (config, config.get("text_config", {})) if name in part]
        if not holders:
            raise KeyError(f"{model_type} has no setting {name}")
        for part in holders:
            part[name] = _merged(part[name], value)
    return config


class NotWrittenError(Exception):
    """mlx_lm cannot write a model in the requested format."""


def write_model(
    directory: Path,
    config: Mapping[str, Any],
    *,
    dtype: str = "float32",
    bits: int | None = None,
) -> Path:
    """Write a model directory that ``mlx_lm.utils.load_model`` and the runner load.

    Like ``mlx_lm.convert``, cast the weights that the type allows to be cast, quantize the
    quantizable layers, and save the parameters under the names in the built model.

    Args:
        directory: Target directory; created if missing.
        config: Contents of ``config.json``.
        dtype: Dtype of the weights that are not quantized: float32, bfloat16 or float16.
        bits: 4 or 8 for a quantized model.

    Returns:
        ``directory``.

    Raises:
        NotWrittenError: mlx_lm cannot quantize this model type.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    directory.mkdir(parents=True, exist_ok=True)
    saved = {"eos_token_id": 0, **copy.deepcopy(dict(config))}
    model = _build_model(saved)
    _cast(model, dtype)
    if bits is not None:
        model, saved = _quantize(model, saved, bits)
    weights = dict(tree_flatten(model.parameters()))
    _settle_head(saved, weights)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(saved, indent=2))
    _write_tokenizer(directory)
    return directory


def _settle_head(config: dict[str, Any], weights: Mapping[str, Any]) -> None:
    """Set ``tie_word_embeddings`` to false if the weights include an output head."""
    if any(name.rpartition(".")[0].endswith(_HEADS) for name in weights):
        for part in (config, config.get("text_config", {})):
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False


def _merged(old: Any, new: Any) -> Any:
    if not isinstance(old, dict) or not isinstance(new, Mapping):
        return copy.deepcopy(new)
    return {**old, **{name: _merged(old.get(name), value) for name, value in new.items()}}


def _build_model(config: Mapping[str, Any]) -> Any:
    import mlx.core as mx
    from mlx.utils import tree_map_with_path
    from mlx_lm.utils import _get_classes

    # Some types modify the configuration passed to them.
    config = copy.deepcopy(dict(config))
    mx.random.seed(_SEED)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    model.update(tree_map_with_path(_randomized, model.parameters()))
    return model


def _randomized(path: str, weight: Any) -> Any:
    import mlx.core as mx

    if weight.dtype == mx.uint32:
        # Weights that the type stores quantized.
        return mx.random.randint(0, 2**32 - 1, weight.shape, dtype=mx.uint32)
    if not mx.issubdtype(weight.dtype, mx.floating) or path.endswith(".signs"):
        return weight
    return weight + _NOISE * mx.random.normal(weight.shape).astype(weight.dtype)


def _cast(model: Any, dtype: str) -> None:
    import mlx.core as mx
    from mlx.utils import tree_map_with_path

    target = getattr(mx, dtype)
    may_cast = getattr(model, "cast_predicate", lambda _path: True)

    def cast(path: str, weight: Any) -> Any:
        is_cast = mx.issubdtype(weight.dtype, mx.floating) and may_cast(path)
        return weight.astype(target) if is_cast else weight

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantize(model: Any, config: dict[str, Any], bits: int) -> tuple[Any, dict[str, Any]]:
    from mlx_lm.utils import quantize_model

    # quantize_model prints progress, and stdout is for results.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            quantized: tuple[Any, dict[str, Any]] = quantize_model(model, config, _GROUP_SIZE, bits)
        except (TypeError, ValueError) as error:
            raise NotWrittenError(f"mlx_lm cannot quantize it ({error})") from error
    return quantized


def _write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with one token per byte, which fits a vocabulary of 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # Byte-level BPE maps each of these bytes to the character with the same code point.
    left_out = {chr(byte) for byte in _NEVER_IN_UTF8}
    characters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - left_out)
    vocabulary = {token: i for i, token in enumerate([_END_TOKEN, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([_END_TOKEN])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": _END_TOKEN}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
