"""Copies of models with another configuration, and what they generate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from runner_server.engine.backend import LoadedModel
from runner_server.engine.logprobs import TokenLogprob
from support.rows import GREEDY, Row, run_rows
from tools.local_batch import LocalBatch

PROMPT = [(37 * i + 11) % 500 + 1 for i in range(100)]

SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}


def changed(source: Path, target: Path, *drop: str, **settings: Any) -> Path:
    """Copy a model and change the configuration."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | settings
    kept = {key: value for key, value in config.items() if key not in drop}
    (target / "config.json").write_text(json.dumps(kept))
    return target


def answer(model: LoadedModel, prompt: list[int] = PROMPT) -> list[TokenLogprob]:
    """Generate four tokens greedily and return their log probabilities."""
    row = Row(prompt, 4, GREEDY.__class__(temperature=0, logprobs=20))
    batch = LocalBatch.of(model)
    run_rows(batch, [row])
    batch.close()
    return row.logprobs
