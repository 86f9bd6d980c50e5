"""Rates of the runner with and without drafts, and with a draft model, in turn."""

from __future__ import annotations

from collections.abc import Sequence

from bench.contenders import OURS
from bench.contenders.base import start_paused
from bench.contenders.ours import Drafting, Ours, RightDraftModel, WrongDraftModel
from bench.fleet import WARM_UP
from bench.models import DEMO, DEMO_WIDE
from bench.prompts import Prompts
from bench.records import ContenderError, Request, rate
from bench.results import Key
from bench.session import Session, setup

MEASURE = "drafts"
DRAFT_MODEL_MEASURE = "draft-model"
STREAMS = {"llama-1m": (1, 8), DEMO: (1, 8), "llama-100m": (1,)}
"""Numbers of concurrent streams for each model."""

DRAFT_MODEL_STREAMS = {DEMO_WIDE: (1, 8)}

MAX_TOKENS = 192

_PROMPT_TOKENS = 64
_WARM_UP_TOKENS = 16


async def measure(session: Session) -> None:
    """Measure greedy and sampled streams of every model, with and without drafts."""
    if OURS not in session.settings.contenders:
        return
    await session.close()
    for model in STREAMS:
        await _measure_model(session, MEASURE, model, (Ours, Drafting))


async def measure_draft_model(session: Session) -> None:
    """Measure streams with drafts by prompt lookup alone, and with right and wrong draft models."""
    if OURS not in session.settings.contenders:
        return
    await session.close()
    kinds = (Drafting, RightDraftModel, WrongDraftModel)
    for model in DRAFT_MODEL_STREAMS:
        await _measure_model(session, DRAFT_MODEL_MEASURE, model, kinds)


async def _measure_model(
    session: Session, measure: str, model: str, kinds: Sequence[type[Ours]]
) -> None:
    try:
        await _measure_in_turn(session, measure, model, [kind(setup(model)) for kind in kinds])
    except (ContenderError, OSError, TimeoutError) as error:
        session.results.fail(OURS, f"{measure}, {model}", str(error))


async def _measure_in_turn(
    session: Session, measure: str, model: str, runners: Sequence[Ours]
) -> None:
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
                        key = Key(measure, model, runner.name, "rate", case)
                        session.results.add(key, value)
    finally:
        for runner in runners:
            await runner.stop()


def _cases(prompts: Prompts, model: str, index: int) -> dict[str, list[Request]]:
    """Return the requests of a round by case, the same ones for both runners."""
    most = _WARM_UP_TOKENS if index == WARM_UP else MAX_TOKENS
    cases = {}
    for streams in (STREAMS | DRAFT_MODEL_STREAMS)[model]:
        for kind in ("greedy", "sampled"):
            texts = (
                prompts.source_code(streams)
                if model in (DEMO, DEMO_WIDE)
                else [prompts.words(_PROMPT_TOKENS) for _ in range(streams)]
            )
            cases[f"{kind}, {streams} {'stream' if streams == 1 else 'streams'}"] = [
                Request(text, most, sampled=kind == "sampled", seed=seed)
                for seed, text in enumerate(texts, start=100 * (index + 1))
            ]
    return cases
