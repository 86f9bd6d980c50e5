"""Adapters with random tensors, written with mlx_lm, and what mlx_lm computes with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_adapter(
    target: Path,
    model: Path,
    *,
    seed: int = 1,
    rank: int = 4,
    scale: float = 2.0,
    keys: Sequence[str] | None = None,
    num_layers: int = -1,
    kind: str = "lora",
    dtype: str = "float32",
) -> Path:
    """Write an adapter for a model, as ``mlx_lm.lora`` does, and return its directory.

    Args:
        target: Directory, created if missing.
        model: Directory of the model.
        seed: Seed of the random tensors.
        rank: Rank of the matrices.
        scale: Factor on their product.
        keys: Layers to adapt; None for all.
        num_layers: Number of the last blocks to adapt; -1 for all.
        kind: ``lora`` or ``dora``.
        dtype: Dtype of the tensors.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    built: Any = load_model(model)[0]
    built.freeze()
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0}
    config = parameters if keys is None else {**parameters, "keys": list(keys)}
    linear_to_lora_layers(built, num_layers, config, use_dora=kind == "dora")
    mx.random.seed(seed)
    trained: Any = tree_flatten(built.trainable_parameters())
    tensors = {name: _randomized(name, value).astype(getattr(mx, dtype)) for name, value in trained}
    target.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(target / "adapters.safetensors"), tensors)
    write_config(target, fine_tune_type=kind, num_layers=num_layers, lora_parameters=config)
    return target


def write_config(target: Path, **values: Any) -> None:
    """Write an adapter's configuration, with keys that mlx_lm writes and nothing reads."""
    (target / "adapter_config.json").write_text(json.dumps({"iters": 10, **values}))


def _randomized(name: str, value: Any) -> Any:
    """Return a tensor that changes the answers: the second matrix begins as zeros."""
    import mlx.core as mx

    if name.endswith(".m"):
        return value * mx.random.uniform(0.7, 1.3, value.shape)
    return mx.random.normal(value.shape) * 0.15


def mlx_lm_tokens(
    model: Path, adapter: Path | None, prompt: Sequence[int], count: int, **load: Any
) -> list[int]:
    """Return the most likely tokens of a text, from mlx_lm alone.

    Args:
        model: Directory of the model.
        adapter: Directory of the adapter; None for the model without one.
        prompt: The prompt.
        count: Number of tokens.
        load: Passed on to mlx_lm's ``load_model``.
    """
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    built: Any = load_model(model, **load)[0]
    if adapter:
        # As mlx_lm.load does.
        built = load_adapters(built, str(adapter))
        built.eval()
    steps = generate_step(mx.array(list(prompt)), built, max_tokens=count)
    return [int(token) for token, _ in steps]
