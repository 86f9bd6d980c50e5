"""Rates of the runner over HTTP and over gRPC, in turn."""

from __future__ import annotations

from bench.contenders import OURS
from bench.contenders.base import start_paused
from bench.contenders.ours import Ours, OverHttp
from bench.fleet import WARM_UP
from bench.models import DEMO
from bench.prompts import Prompts
from bench.records import ContenderError, Request, rate
from bench.results import Key
from bench.session import Session, setup

MEASURE = "http"
MODELS = ("llama-1m", DEMO, "llama-100m")
STREAMS = (1, 16)
MAX_TOKENS = {"llama-1m": 256, DEMO: 256, "llama-100m": 48}

_PROMPT_TOKENS = 64
_WARM_UP_TOKENS = 16


async def measure(session: Session) -> None:
    """Measure greedy streams of every model over both."""
    if OURS not in session.settings.contenders:
        return
    await session.close()
    for model in MODELS:
        runners = Ours(setup(model)), OverHttp(setup(model))
        try:
            await start_paused(runners)
            for index in range(WARM_UP, session.settings.rounds):
                await _round(session, model, runners, index)
        except (ContenderError, OSError, TimeoutError) as error:
            session.results.fail(OURS, f"{MEASURE}, {model}", str(error))
        finally:
            for runner in runners:
                await runner.stop()


async def _round(session: Session, model: str, runners: tuple[Ours, Ours], index: int) -> None:
    most = _WARM_UP_TOKENS if index == WARM_UP else MAX_TOKENS[model]
    loads = {count: _requests(session.prompts(model), count, most) for count in STREAMS}
    for runner in runners if index % 2 else runners[::-1]:
        runner.resume()
        rates = {count: rate(await runner.run(load)) for count, load in loads.items()}
        await runner.quiet()
        runner.pause()
        if index != WARM_UP:
            for count, value in rates.items():
                session.results.add(Key(MEASURE, model, runner.name, "rate", count), value)


def _requests(prompts: Prompts, count: int, most: int) -> list[Request]:
    return [Request(prompts.words(_PROMPT_TOKENS), most) for _ in range(count)]
