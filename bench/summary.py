"""Head of the report: the models, and what the run comes to."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import Any

from bench import tables
from bench.contenders import OURS
from bench.measures.throughput import GREEDY, PLANS, SAMPLED
from bench.models import DEMO, SHAPES
from bench.paths import DEMO_MODEL
from bench.results import Results
from bench.targets import Reading, Verdict, best_peer, ratio

_STREAMS = 16

_TEXT = """\
{met} of {judged} targets were met; each missed one has a sentence below. Tokens per second of ours
with {streams} streams, and their ratio to mlx_lm called without a server (direct) and to the better
of the two peers, with what the extremes of the rounds make of it:"""


def render(results: Results, judged: Sequence[Verdict]) -> str:
    """Render how many targets were met, and ours beside the others on each model."""
    known = [verdict for verdict in judged if verdict.met is not None]
    met = sum(bool(verdict.met) for verdict in known)
    text = _TEXT.format(met=met, judged=len(known), streams=_STREAMS)
    rows = [
        [model, measure, *_cells(results, measure, model)]
        for model in PLANS
        for measure in (GREEDY, SAMPLED)
        if results.values(measure, model, OURS, "rate", _STREAMS)
    ]
    if not rows:
        return text.partition("; ")[0] + "."
    return f"{text}\n\n{tables.markdown(['model', '', 'ours', '/ direct', '/ best peer'], rows)}"


def _cells(results: Results, measure: str, model: str) -> list[str]:
    ours = results.values(measure, model, OURS, "rate", _STREAMS)
    direct = results.values(measure, model, "direct", "rate", _STREAMS)
    peer = best_peer(results, measure, model, "rate", _STREAMS, lowest=False)
    rate = tables.figure(statistics.median(ours))
    return [rate, _words(ratio(ours, direct)), _words(ratio(ours, peer))]


def _words(reading: Reading | None) -> str:
    if reading is None:
        return "-"
    value, low, high = (f"{each:.2f}" for each in (reading.value, reading.low, reading.high))
    return value if low == high else f"{value} ({low} to {high})"


def models() -> str:
    """Render the table of models."""
    demo = json.loads((DEMO_MODEL / "config.json").read_text(encoding="utf-8"))
    rows = [[DEMO, *_shape(demo, demo["vocab_size"]), "float32", "trained, in the package"]]
    for name, shape in SHAPES.items():
        stored = "4 bits" if shape.quantized else "float32"
        rows.append([name, *_shape(shape.config, shape.vocab_size), stored, "random"])
    head = ["model", "type", "layers x width", "vocabulary", "stored as", "weights"]
    return tables.markdown(head, rows)


def _shape(config: dict[str, Any], vocab_size: int) -> list[str]:
    size = f"{config['num_hidden_layers']} x {config['hidden_size']}"
    return [config["model_type"], size, f"{vocab_size:,}"]
