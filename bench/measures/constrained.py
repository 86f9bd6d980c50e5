"""Rates, first tokens and gaps of constrained streams beside those of free ones."""

from __future__ import annotations

import itertools
import json
import statistics

from bench.contenders import OURS, Contender
from bench.fleet import WARM_UP, Fleet, Sample, Turn
from bench.models import ENDING
from bench.prompts import Prompts
from bench.records import Record, Request, rate
from bench.session import Session, setup
from bench.stats import percentile

MODELS = tuple(ENDING)
STREAMS = 16
MAX_TOKENS = 96

_PROMPT_TOKENS = 16
_WARM_UP_TOKENS = 8
_P99 = 99

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["person", "company", "unknown"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
SCHEMA = json.dumps({"type": "array", "items": _PERSON, "minItems": 900, "maxItems": 999})
"""An array that cannot be complete within ``MAX_TOKENS``, so that no stream ends early."""


async def measure(session: Session) -> None:
    """Measure free and constrained streams in turn, greedy and sampled."""
    await session.close()
    for model in MODELS:
        prompts = session.prompts(model)
        fleet = Fleet(model, setup(model), session.others((OURS,)), session.results)
        try:
            await fleet.start("constrained")
            turn = _turn(prompts)
            await fleet.rounds("constrained", turn, session.settings.rounds)
        finally:
            await fleet.stop()


def _turn(prompts: Prompts) -> Turn:
    async def turn(contender: Contender, index: int) -> list[Sample]:
        samples: list[Sample] = []
        kinds = list(itertools.product(("greedy", "sampled"), ("free", "constrained")))
        # Rotated, so that no kind always runs after the same other one.
        for drawn, kind in kinds if index % 2 else kinds[::-1]:
            requests = [
                Request(
                    prompts.words(_PROMPT_TOKENS),
                    MAX_TOKENS if index != WARM_UP else _WARM_UP_TOKENS,
                    sampled=drawn == "sampled",
                    seed=seed,
                    json_schema=SCHEMA if kind == "constrained" else "",
                )
                for seed in range(1, STREAMS + 1)
            ]
            records = await contender.run(requests)
            samples += _samples(f"{drawn}, {kind}", records)
        return samples

    return turn


def _samples(case: str, records: list[Record]) -> list[Sample]:
    gaps = [
        after - before
        for record in records
        for (before, _), (after, _) in itertools.pairwise(record.chunks)
    ]
    first = statistics.median(record.ttft_seconds for record in records)
    return [
        Sample("rate", case, rate(records)),
        Sample("ttft_seconds", case, first),
        Sample("gap_seconds", case, percentile(gaps, _P99)),
    ]
