"""Rates of a 4-bit model on a CPU, with the runner and the peers as installed."""

from __future__ import annotations

from bench.contenders import OURS, PEERS, Contender
from bench.fleet import WARM_UP, Fleet, Sample
from bench.records import Request
from bench.session import Session, setup

MODEL = "llama-100m-4bit"

_PROMPT_TOKENS = 64
_MAX_TOKENS = 12
_WARM_UP_TOKENS = 4


async def measure(session: Session) -> None:
    """Measure the rates of prefill and decode, one stream at a time."""
    prompts = session.prompts(MODEL)
    await session.close()
    rounds = range(WARM_UP, session.settings.rounds)
    requests = {
        index: Request(prompts.words(_PROMPT_TOKENS), _MAX_TOKENS)
        if index != WARM_UP
        else Request(prompts.words(_WARM_UP_TOKENS), _WARM_UP_TOKENS)
        for index in rounds
    }

    async def turn(contender: Contender, index: int) -> list[Sample]:
        (record,) = await contender.run([requests[index]])
        return [
            Sample("decode_rate", 1, record.decode_rate),
            Sample("prompt_rate", 1, record.prompt_tokens / record.ttft_seconds),
        ]

    # One fleet at a time: the BLAS differs, and the peers keep the weights in another format.
    for blas, names in (("auto", (OURS,)), ("off", PEERS)):
        fleet = Fleet(MODEL, setup(MODEL, blas), session.others(names), session.results)
        try:
            await fleet.start("quantized")
            await fleet.rounds("quantized", turn, session.settings.rounds)
        finally:
            await fleet.stop()
