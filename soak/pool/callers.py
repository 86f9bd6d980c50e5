"""Callers of a pool: ask for a model, read an answer, and compare it with the reference."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from runner_client import AsyncRunnerClient, Options, RunnerError
from soak.pool.mix import MAX_NEW_TOKENS, PoolMix
from soak.pool.outcome import Look, judge
from soak.pool.records import Phase, PoolOrder
from soak.records import Ending

STUCK_SECONDS = 90.0
"""Time limit of a request, including its wait for the model."""

Lease = Callable[[PoolOrder], AbstractAsyncContextManager[AsyncRunnerClient]]
"""Gives a caller the client of the model of its request."""


@dataclass(frozen=True)
class Known:
    """Known prompts and the answers of every model.

    Attributes:
        prompts: Prompts as token ids.
        answers: Token ids generated for each prompt, by model.
    """

    prompts: Sequence[tuple[int, ...]]
    answers: Mapping[str, Sequence[tuple[int, ...]]]


class Caller:
    """One caller of a scheduler, which sends a request after the other.

    Args:
        name: Name of the scheduler.
        lease: Gives the client of a model.
        look: Returns the state of a model in the scheduler.
        mix: Source of the requests.
        known: Prompts and reference answers.
        phase: Receives the outcomes.
    """

    def __init__(
        self,
        name: str,
        lease: Lease,
        look: Callable[[str], Look],
        mix: PoolMix,
        known: Known,
        phase: Phase,
    ) -> None:
        self._name = name
        self._lease = lease
        self._look = look
        self._mix = mix
        self._known = known
        self._phase = phase

    async def run(self, end: float) -> None:
        """Send requests until a time of the event loop's clock."""
        loop = asyncio.get_running_loop()
        while loop.time() < end:
            order = self._mix.next()
            await asyncio.sleep(order.pause_seconds)
            await self.ask(order)

    async def ask(self, order: PoolOrder) -> None:
        """Send a request, and count the outcome."""
        self._phase.tally.sent += 1
        got: list[int] = []
        ending, problem = await self._serve(order, got)
        self._count(order, ending, problem, got)

    async def _serve(self, order: PoolOrder, got: list[int]) -> tuple[Ending, str]:
        before, sent = self._look(order.model), time.monotonic()
        limit = STUCK_SECONDS if order.cancel_seconds is None else order.cancel_seconds
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                try:
                    async with asyncio.timeout(limit):
                        return await self._complete(order, got, sent), ""
                except TimeoutError:
                    if order.cancel_seconds is not None:
                        return Ending.CANCELLED, ""
                    raise
        except TimeoutError:
            return Ending.STUCK, f"stuck: {order} has not ended within {STUCK_SECONDS:.0f} s"
        except RunnerError as error:
            seconds = time.monotonic() - sent
            return judge(order, error, seconds, before, self._look(order.model))
        except Exception as error:  # noqa: BLE001 - any other error is a defect to report
            return Ending.FAILED, f"{order.model}: outside the table: {error!r}"

    async def _complete(self, order: PoolOrder, got: list[int], sent: float) -> Ending:
        tally = self._phase.tally
        async with self._lease(order) as client:
            tally.queue_seconds.append(time.monotonic() - sent)
            prompt = self._known.prompts[order.prompt]
            stream = client.completion(prompt, options=_greedy(order.count))
            async with stream:
                async for chunk in stream:
                    if chunk.token_ids and not got:
                        tally.first_seconds.append(time.monotonic() - sent)
                    got.extend(chunk.token_ids)
                    if order.cancel_tokens is not None and len(got) >= order.cancel_tokens:
                        return Ending.DONE if chunk.done else Ending.CANCELLED
        return Ending.DONE

    def _count(self, order: PoolOrder, ending: Ending, problem: str, got: list[int]) -> None:
        tally = self._phase.tally
        tally.endings[ending] += 1
        tally.tokens += len(got)
        if problem:
            tally.note_problem(problem)
        if ending is Ending.DONE:
            tally.compared += 1
            self._phase.served[self._name] += 1
        elif got:
            tally.prefixes += 1
        count = order.count if ending is Ending.DONE else len(got)
        expected = self._known.answers[order.model][order.prompt][:count]
        if tuple(got) != expected:
            tally.differing += 1
            tally.note_problem(
                f"{order.model} answered prompt {order.prompt} with {got} instead of {expected}"
            )


async def reference(client: AsyncRunnerClient, prompt: Sequence[int]) -> tuple[int, ...]:
    """Return the greedy answer to a prompt, of the greatest length that is asked for."""
    return (await client.complete(prompt, options=_greedy(MAX_NEW_TOKENS))).token_ids


def _greedy(count: int) -> Options:
    return Options(temperature=0, seed=0, num_predict=count)
