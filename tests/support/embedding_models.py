"""Files with which a model directory says that the model embeds texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_KINDS = ("Transformer", "Pooling", "Normalize")


def module(number: int, kind: str) -> dict[str, Any]:
    """Return an entry of modules.json."""
    path = "" if number == 0 else f"{number}_{kind}"
    type_ = f"sentence_transformers.models.{kind}"
    return {"idx": number, "name": str(number), "path": path, "type": type_}


def say_that_it_embeds(
    path: Path,
    pooling: dict[str, Any] | None = None,
    *,
    normalizes: bool = True,
    transformer: dict[str, Any] | None = None,
) -> Path:
    """Write the files of sentence-transformers into a model directory, and return the directory.

    Args:
        path: The directory.
        pooling: Content of the pooling's config.json; None for the last token.
        normalizes: Whether vectors have length 1.
        transformer: Content of sentence_bert_config.json; None for no file.
    """
    kinds = _KINDS if normalizes else _KINDS[:2]
    modules = [module(number, kind) for number, kind in enumerate(kinds)]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "1_Pooling").mkdir(parents=True, exist_ok=True)
    settings = {"pooling_mode_lasttoken": True} if pooling is None else pooling
    (path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if transformer is not None:
        (path / "sentence_bert_config.json").write_text(json.dumps(transformer))
    return path
