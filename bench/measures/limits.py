"""Share of the machine's limits reached by the runner, at the shapes of each model.

A decode step reads all weights and the KV caches once and multiplies one row per stream by every
weight matrix, so it takes at least the time of either. Prefill multiplies all rows of the prompt.
Attention, norms and sampling are not part of the limits.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.contenders import OURS, Contender
from bench.contenders.base import start_paused
from bench.contenders.machine import Machine, MachineRates
from bench.contenders.ours import Ours
from bench.fleet import WARM_UP
from bench.measures.throughput import PLANS, Plan
from bench.models import SIZES
from bench.records import ContenderError, Record, Request
from bench.results import Key
from bench.session import Session, setup

MEASURE = "limits"
MACHINE = Machine.name
STREAMS = (1, 16, 32)
PROMPT_TOKENS = 512

_DECODE_TOKENS = 32
_SIZES = [Plan(name, greedy=(1,), sampled=(), prompt_tokens=64) for name in SIZES]


async def measure(session: Session) -> None:
    """Measure the machine and the runner in turn, for every model of the throughput."""
    if OURS not in session.settings.contenders:
        return
    await session.close()
    for plan in (*PLANS.values(), *_SIZES):
        try:
            await _measure_model(session, plan)
        except (ContenderError, OSError, TimeoutError) as error:
            session.results.fail(OURS, f"{MEASURE}, {plan.model}", str(error))


async def _measure_model(session: Session, plan: Plan) -> None:
    programs = machine, ours = Machine(setup(plan.model)), Ours(setup(plan.model))
    try:
        await start_paused(programs)
        weights = Key(MEASURE, plan.model, MACHINE, "weight_bytes", 1)
        session.results.add(weights, machine.weight_bytes)
        for index in range(WARM_UP, session.settings.rounds):
            machine.resume()
            limits = await _limits(machine, plan)
            machine.pause()
            ours.resume()
            reached = await _reached(session, ours, plan)
            await ours.quiet()
            ours.pause()
            if index != WARM_UP:
                for contender, rates in ((MACHINE, limits), (OURS, reached)):
                    for (metric, case), value in rates.items():
                        key = Key(MEASURE, plan.model, contender, metric, case)
                        session.results.add(key, value)
    finally:
        for program in programs:
            await program.stop()


Rates = dict[tuple[str, int], float]
"""Tokens per second by metric, and by number of streams or of prompt tokens."""


async def _limits(machine: Machine, plan: Plan) -> Rates:
    products = [*((streams, streams) for streams in _streams(plan)), (PROMPT_TOKENS, 1)]
    rates = await machine.measure(plan.prompt_tokens + _DECODE_TOKENS // 2, products)
    return limits_of(machine.weight_bytes, rates, _streams(plan))


def _streams(plan: Plan) -> Sequence[int]:
    """Return the numbers of streams to measure: one where a step takes long."""
    return STREAMS if plan.model in PLANS else STREAMS[:1]


def limits_of(weight_bytes: int, rates: MachineRates, numbers: Sequence[int]) -> Rates:
    """Return the highest rates possible on the machine.

    Args:
        weight_bytes: Bytes of the weights that a decode step reads.
        rates: The machine's rates, with products for each number of streams and for a prompt.
        numbers: Numbers of streams.
    """
    *steps, prefill = rates.product_seconds
    found: Rates = {("prompt_rate", PROMPT_TOKENS): PROMPT_TOKENS / prefill}
    for streams, product_seconds in zip(numbers, steps, strict=True):
        read_seconds = (weight_bytes + streams * rates.kv_bytes) / rates.copy_rate
        # The products of one row are bound by the reading of the weights anyway.
        seconds = read_seconds if streams == 1 else max(read_seconds, product_seconds)
        found["decode_rate", streams] = streams / seconds
    return found


async def _reached(session: Session, ours: Contender, plan: Plan) -> Rates:
    prompts = session.prompts(plan.model)
    (record,) = await ours.run([Request(prompts.words(PROMPT_TOKENS), 2)])
    found: Rates = {("prompt_rate", PROMPT_TOKENS): PROMPT_TOKENS / record.ttft_seconds}
    for streams in _streams(plan):
        requests = [
            Request(prompts.words(plan.prompt_tokens), 2 * _DECODE_TOKENS) for _ in range(streams)
        ]
        found["decode_rate", streams] = decode_rate(await ours.run(requests))
    return found


def decode_rate(records: Sequence[Record]) -> float:
    """Return tokens per second while every stream decodes.

    Raises:
        ContenderError: The streams did not overlap.
    """
    begin, end = max(record.first for record in records), min(record.last for record in records)
    if end <= begin:
        raise ContenderError("the first stream ended before the last one began")
    tokens = sum(
        count for record in records for time, count in record.chunks if begin < time <= end
    )
    return tokens / (end - begin)
