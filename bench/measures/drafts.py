"""Rates of the runner with and without drafts, in turn."""

from __future__ import annotations

from bench.contenders import OURS
from bench.contenders.base import start_paused
from bench.contenders.ours import Drafting, Ours
from bench.fleet import WARM_UP
from bench.models import DEMO
from bench.prompts import Prompts
from bench.records import ContenderError, Request, rate
from bench.results import Key
from bench.session import Session, setup

MEASURE = "drafts"
STREAMS = {"llama-1m": (1, 8), DEMO: (1, 8), "llama-100m": (1,)}
"""Numbers of concurrent streams for each model."""

MAX_TOKENS = 192

_PROMPT_TOKENS = 64
_WARM_UP_TOKENS = 16


async def measure(session: Session) -> None:
    """Measure greedy and sampled streams of every model, with and without drafts."""
    if OURS not in session.settings.contenders:
        return
    await session.close()
    for model in STREAMS:
        try:
            await _measure_model(session, model)
        except (ContenderError, OSError, TimeoutError) as error:
            session.results.fail(OURS, f"{MEASURE}, {model}", str(error))


async def _measure_model(session: Session, model: str) -> None:
    runners = [Ours(setup(model)), Drafting(setup(model))]
    prompts = session.prompts(model)
    try:
        await start_paused(runners)
        for index in range(WARM_UP, session.settings.rounds):
            cases = _cases(prompts, model, WARM_UP if index == WARM_UP else index)
            for runner in runners if index % 2 else runners[::-1]:
                runner.resume()
                rates = {case: rate(await runner.run(each)) for case, each in cases.items()}
                await runner.quiet()
                runner.pause()
                if index != WARM_UP:
                    for case, value in rates.items():
                        key = Key(MEASURE, model, runner.name, "rate", case)
                        session.results.add(key, value)
    finally:
        for runner in runners:
            await runner.stop()


def _cases(prompts: Prompts, model: str, index: int) -> dict[str, list[Request]]:
    """Return the requests of a round by case, the same ones for both runners."""
    most = _WARM_UP_TOKENS if index == WARM_UP else MAX_TOKENS
    cases = {}
    for streams in STREAMS[model]:
        for kind in ("greedy", "sampled"):
            texts = (
                prompts.source_code(streams)
                if model == DEMO
                else [prompts.words(_PROMPT_TOKENS) for _ in range(streams)]
            )
            cases[f"{kind}, {streams} {'stream' if streams == 1 else 'streams'}"] = [
                Request(text, most, sampled=kind == "sampled", seed=seed)
                for seed, text in enumerate(texts, start=100 * (index + 1))
            ]
    return cases
