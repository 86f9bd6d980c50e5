"""Measures of the benchmark: two schedulers on one trace, and four ways to a first token."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from bench.load import drive
from bench.models import ensure_model
from bench.pool.memory import sampled
from bench.pool.schedulers import CAPACITY, OPTIONS, SCHEDULERS, Scheduler
from bench.pool.trace import PooledRequest, make_trace
from bench.prompts import Prompts
from bench.records import ContenderError, Record, Request
from bench.results import Case, Key, Results
from bench.stats import percentile
from runner_client import AsyncRunnerProcess, MemoryGate, Options, PoolSettings
from runner_client.process.aio_spare import SpareProcess

logger = logging.getLogger("bench")

TRACE, SWAP, MODEL = "pool-trace", "pool-swap", "pool"
COLD, SPARE, WARM, RESIDENT = "cold", "spare", "warm", "resident"

TRACED = ("pool-20", "pool-30", "pool-40", "pool-50")
SWAPPED = ("pool-40", "pool-60")
PROMPT_TOKENS = 64

_TURN_SECONDS = 900.0
_SWAPS = 3
_POLL_SECONDS = 0.05
_REST_SECONDS = PoolSettings().min_residence_seconds + 0.5
"""Pause before a swap is measured, so that no model is too young to be evicted."""


@dataclass(frozen=True)
class Settings:
    """Settings from the command line.

    Attributes:
        quick: Run a short version.
    """

    quick: bool = False

    @property
    def rounds(self) -> int:
        """Number of times each scheduler runs the trace; even, so that each is first as often."""
        return 2 if self.quick else 4

    @property
    def swap_rounds(self) -> int:
        """Number of times each way to a first token is measured."""
        return 4 if self.quick else 12

    @property
    def trace_seconds(self) -> float:
        """Length of the trace."""
        return 15.0 if self.quick else 60.0


async def measure_trace(settings: Settings, results: Results) -> None:
    """Run the trace with each scheduler, in turns: first to last, then last to first."""
    paths = {name: ensure_model(name) for name in TRACED}
    prompts = Prompts(paths[TRACED[0]])
    names = list(SCHEDULERS)
    for index in range(settings.rounds):
        # The same models at the same times in each round, with prompts that are in no cache.
        trace = make_trace(
            TRACED, settings.trace_seconds, lambda: prompts.words(PROMPT_TOKENS), seed=0
        )
        for kind in names if index % 2 == 0 else names[::-1]:
            try:
                async with asyncio.timeout(_TURN_SECONDS):
                    await _turn(kind(paths), trace, prompts, results)
            except (ContenderError, OSError, TimeoutError) as error:
                why = str(error) or f"not finished within {_TURN_SECONDS:.0f} s"
                logger.warning("%s: %s", kind.name, why)
                results.fail(kind.name, TRACE, why)


async def _turn(
    scheduler: Scheduler, trace: list[PooledRequest], prompts: Prompts, results: Results
) -> None:
    def add(metric: str, value: float, case: Case = 1) -> None:
        results.add(Key(TRACE, MODEL, scheduler.name, metric, case), value)

    async def stream(request: Request, record: Record) -> None:
        if not isinstance(request, PooledRequest):
            raise TypeError("a request of a trace names its model")
        await scheduler.stream(request.model, request, record)

    async with scheduler:
        async with sampled() as sizes:
            records = await drive(stream, trace)
        loads = scheduler.loads
        waits = [record.ttft_seconds for record in records]
        begin, end = min(each.sent for each in records), max(each.last for each in records)
        add("rate", 60 * len(records) / (end - begin))
        add("p50_seconds", percentile(waits, 50))
        add("p95_seconds", percentile(waits, 95))
        add("loads_count", loads)
        add("peak_bytes", max(size for _, size in sizes))
        for wait in waits:
            add("ttft_seconds", wait)
        results.timelines[f"{scheduler.name}, seconds"] = [round(at, 2) for at, _ in sizes]
        results.timelines[f"{scheduler.name}, MiB"] = [round(size / 2**20, 1) for _, size in sizes]
        for seconds in await _swaps(stream, prompts):
            add("swap_seconds", seconds)
    logger.info("%s: %d requests, %d loads", scheduler.name, len(records), loads)


async def _swaps(
    stream: Callable[[Request, Record], Awaitable[None]],
    prompts: Prompts,
) -> list[float]:
    """Return the times to first token of requests for models that are not loaded.

    With all memory taken and no other request, that is the time of an eviction, a load and a
    prefill.
    """
    times = []
    # Of four models in turn, none is among the two most recent ones.
    for number in range(CAPACITY + _SWAPS):
        is_measured = number >= CAPACITY
        if is_measured:
            await asyncio.sleep(_REST_SECONDS)
        model = TRACED[number % len(TRACED)]
        request = PooledRequest(prompts.words(PROMPT_TOKENS), 1, model=model)
        (record,) = await drive(stream, [request])
        if is_measured:
            times.append(record.ttft_seconds)
    return times


async def measure_swap(settings: Settings, results: Results) -> None:
    """Measure the first token with a new process, with loads in running ones, and without."""
    paths = {name: ensure_model(name) for name in SWAPPED}
    prompts = Prompts(paths[SWAPPED[0]])
    ways = [(COLD, _cold), (SPARE, _spare), (WARM, _warm), (RESIDENT, _resident)]
    async with AsyncRunnerProcess(str(paths[SWAPPED[0]]), options=OPTIONS) as process:
        for index in range(-1, settings.swap_rounds):
            model = SWAPPED[(index + 1) % 2 - 1]
            for name, way in ways if index % 2 == 0 else ways[::-1]:
                prompt = prompts.words(PROMPT_TOKENS).token_ids
                seconds = await way(process, str(paths[model]), prompt)
                if index >= 0:  # the first round fills the page cache
                    results.add(Key(SWAP, MODEL, name, "ttft_seconds", 1), seconds)


async def _cold(_: AsyncRunnerProcess, model: str, prompt: tuple[int, ...]) -> float:
    begin = time.monotonic()
    async with AsyncRunnerProcess(model, options=OPTIONS) as process:
        return await _first_token(process, prompt, begin)


async def _spare(_: AsyncRunnerProcess, model: str, prompt: tuple[int, ...]) -> float:
    spare = SpareProcess(gate=MemoryGate(), timeouts=None, blas="auto", env=None, log=None)
    try:
        await spare.start()
        # The name of the device is known once MLX is imported.
        while not (await spare.client.status()).device:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(_POLL_SECONDS)
        begin = time.monotonic()
        spare.choose(model, OPTIONS)
        await spare.load()
        await spare.wait_until_running()
        return await _first_token(spare, prompt, begin)
    finally:
        await spare.close()


async def _warm(process: AsyncRunnerProcess, model: str, prompt: tuple[int, ...]) -> float:
    begin = time.monotonic()
    await process.client.unload()
    await process.client.load(model, options=OPTIONS)
    return await _first_token(process, prompt, begin)


async def _resident(process: AsyncRunnerProcess, _: str, prompt: tuple[int, ...]) -> float:
    return await _first_token(process, prompt, time.monotonic())


async def _first_token(process: AsyncRunnerProcess, prompt: tuple[int, ...], begin: float) -> float:
    options = Options(temperature=0, num_predict=1)
    async with process.client.completion(prompt, options=options) as chunks:
        async for chunk in chunks:
            if chunk.token_ids:
                return time.monotonic() - begin
    raise ContenderError("a stream returned no token")


Measure = Callable[[Settings, Results], Awaitable[None]]

MEASURES: Mapping[str, Measure] = {"trace": measure_trace, "swap": measure_swap}
