"""Draft models for the demo model: itself, one that often guesses alike, and a random one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

DEMO = Path(__file__).parents[2] / "runner_server/demo/model"


def noisy(target: Path, share: float, seed: int = 0) -> Path:
    """Write the demo model with noise in its weights, so that it guesses worse.

    Args:
        target: The directory to write.
        share: Standard deviation of the noise, as a share of that of each weight.
        seed: Seed of the noise.
    """
    import mlx.core as mx

    shutil.copytree(DEMO, target)
    loaded: Any = mx.load(str(target / "model.safetensors"))
    key = mx.random.key(seed)
    weights = {}
    for name, value in loaded.items():
        key, own = mx.random.split(key)
        spread = share * mx.std(value.astype(mx.float32))
        weights[name] = (value + spread * mx.random.normal(value.shape, key=own)).astype(
            value.dtype
        )
    mx.eval(weights)
    mx.save_safetensors(str(target / "model.safetensors"), weights, metadata={"format": "mlx"})
    return target


def with_another_token(target: Path) -> Path:
    """Write the demo model with one token spelled differently."""
    shutil.copytree(DEMO, target)
    file = target / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    # No merge makes the last token any more, which is fine for a file that is only compared.
    last = max(vocabulary, key=vocabulary.get)
    merges = values["model"]["merges"]
    joined = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    kept = [m for m, text in zip(merges, joined, strict=True) if text.replace(" ", "") != last]
    values["model"]["merges"] = kept
    vocabulary["zzzzzzzz"] = vocabulary.pop(last)
    file.write_text(json.dumps(values), encoding="utf-8")
    return target
