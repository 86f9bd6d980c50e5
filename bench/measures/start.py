"""Time from starting the process to the first token of a short prompt."""

from __future__ import annotations

import logging
import time

from bench.contenders import CONTENDERS
from bench.records import ContenderError, Prompt, Request
from bench.results import Key
from bench.session import Session, setup

logger = logging.getLogger(__name__)

MODEL = "llama-1m"

_PROMPT_TOKENS = 8


async def measure(session: Session) -> None:
    """Start each contender in every round and send a request immediately."""
    await session.close()
    prompt = session.prompts(MODEL).words(_PROMPT_TOKENS)
    names = list(session.settings.contenders)
    for index in range(session.settings.rounds + 1):
        for name in list(names):
            try:
                seconds = await _first_token_seconds(name, prompt)
            except (ContenderError, OSError) as error:
                logger.warning("start, %s: %s", name, error)
                session.results.fail(name, "start", str(error))
                names.remove(name)
                continue
            if index:  # the first round fills the page cache and the compiler cache
                session.results.add(Key("start", MODEL, name, "start_seconds", 1), seconds)


async def _first_token_seconds(name: str, prompt: Prompt) -> float:
    contender = CONTENDERS[name](setup(MODEL))
    begin = time.monotonic()
    try:
        await contender.start()
        (record,) = await contender.run([Request(prompt, 1)])
    finally:
        await contender.stop()
    return record.first - begin
