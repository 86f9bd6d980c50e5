"""Agreement of greedy output between contenders on a trained model."""

from __future__ import annotations

from bench.contenders import CONTENDERS, Contender
from bench.fleet import Sample
from bench.models import DEMO
from bench.records import Request
from bench.session import Session
from bench.stats import common_prefix

_PROMPTS = 8
_MAX_TOKENS = 96


async def measure(session: Session) -> None:
    """Complete the same eight source excerpts concurrently and compare the token ids."""
    fleet = await session.fleet(DEMO, "agreement")
    requests = [
        Request(prompt, _MAX_TOKENS, want_ids=True)
        for prompt in session.prompts(DEMO).source_code(_PROMPTS)
    ]
    answers: dict[str, list[list[int]]] = {}

    async def turn(contender: Contender, _: int) -> list[Sample]:
        records = await contender.run(requests)
        ids = [record.token_ids for record in records]
        answers[contender.name] = ids
        reference = answers.get(next(iter(CONTENDERS)), ids)
        alike = [common_prefix(*pair) for pair in zip(reference, ids, strict=True)]
        return [
            Sample("tokens", "all", _PROMPTS * _MAX_TOKENS),
            Sample("tokens", "alike", sum(alike)),
            Sample("streams", "all", _PROMPTS),
            Sample("streams", "alike", sum(count == _MAX_TOKENS for count in alike)),
        ]

    await fleet.rounds("agreement", turn, 1, warm_up=False)
