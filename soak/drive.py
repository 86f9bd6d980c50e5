"""Open-loop load at twice the rate at which the server finishes requests."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack

import grpc

from mlxrunner.v1 import runner_pb2_grpc
from soak.follow import Follower, Outcome
from soak.mix import Mix
from soak.records import Answer, Ending, Order, Tally
from soak.server import Runner

OVERLOAD = 2.0
"""Target ratio of requests sent to requests accepted. With a full queue the server accepts requests
at the rate of its capacity."""

CONNECTIONS = 4
MAX_IN_FLIGHT = 400
_WINDOW_SECONDS = 10.0
_MIN_PER_SECOND, _MAX_PER_SECOND = 4.0, 150.0


class Pace:
    """Request rate that is twice the capacity of the server.

    Capacity is the recent rate of finished requests. As long as the server keeps up, the rate
    keeps growing; once the queue is full, the rate settles.

    Args:
        begin: Current time in seconds.
    """

    def __init__(self, begin: float) -> None:
        self._begin = begin
        self._ends: deque[float] = deque()

    def note_end(self, now: float) -> None:
        """Record the end of an accepted request."""
        self._ends.append(now)

    def per_second(self, now: float) -> float:
        """Return the number of requests to send per second."""
        while self._ends and self._ends[0] < now - _WINDOW_SECONDS:
            self._ends.popleft()
        window = min(_WINDOW_SECONDS, max(1.0, now - self._begin))
        wanted = OVERLOAD * len(self._ends) / window
        return min(_MAX_PER_SECOND, max(_MIN_PER_SECOND, wanted))


class Driver:
    """Load generator that sends requests, follows the streams and tallies the outcomes.

    Args:
        runner: Server under load.
        mix: Source of requests.
        tally: Receives the outcomes.
        answers: Reference answers of the known set, generated without load.
        seed: Seed of the intervals between requests.
    """

    def __init__(
        self, runner: Runner, mix: Mix, tally: Tally, answers: Sequence[Answer], seed: int
    ) -> None:
        self._runner = runner
        self._mix = mix
        self._tally = tally
        self._answers = answers
        self._random = random.Random(seed)
        self._pace = Pace(time.monotonic())
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float) -> None:
        """Send requests for ``seconds``, then wait until every stream has ended."""
        async with AsyncExitStack() as stack:
            channels = [
                await stack.enter_async_context(self._runner.dial()) for _ in range(CONNECTIONS)
            ]
            try:
                await self._send(channels, seconds)
                # Every follower has a time limit.
                await asyncio.gather(*self._tasks, return_exceptions=True)
            finally:
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self, channels: Sequence[grpc.aio.Channel], seconds: float) -> None:
        due = time.monotonic()
        end = due + seconds
        while due < end and self._runner.is_alive:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            self._launch(self._random.choice(channels))
            now = time.monotonic()
            # Do not catch up on more than one second of delay: a burst would change the load.
            due = max(due, now - 1.0) + self._random.expovariate(self._pace.per_second(now))

    def _launch(self, channel: grpc.aio.Channel) -> None:
        order = self._mix.next()
        if len(self._tasks) >= MAX_IN_FLIGHT:
            self._tally.held_back += 1
            return
        self._tally.sent += 1
        task = asyncio.create_task(self._serve(order, channel))
        self._tasks.add(task)
        task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._tally.endings[Ending.FAILED] += 1
            self._tally.note_problem(f"client error: {error!r}")

    async def _serve(self, order: Order, channel: grpc.aio.Channel) -> None:
        follower = Follower(order, self._on_tokens)
        # A slow reader must not block other streams of the same connection.
        if order.own_connection or not order.reader.is_quick:
            async with self._runner.dial(limit_read_ahead=not order.reader.is_quick) as own:
                outcome = await follower.run(runner_pb2_grpc.RunnerServiceStub(own))
        else:
            outcome = await follower.run(runner_pb2_grpc.RunnerServiceStub(channel))
        self._count(order, outcome)

    def _on_tokens(self, count: int) -> None:
        self._tally.tokens += count

    def _count(self, order: Order, outcome: Outcome) -> None:
        tally = self._tally
        tally.endings[outcome.ending] += 1
        if outcome.ending not in (Ending.REFUSED, Ending.REJECTED):
            self._pace.note_end(time.monotonic())
        if outcome.problem:
            tally.note_problem(outcome.problem)
        self._compare(order, outcome)
        for values, value in (
            (tally.first_seconds, outcome.first_seconds),
            (tally.queue_seconds, outcome.queue_seconds),
            (tally.retry_seconds, outcome.retry_seconds),
        ):
            if value is not None:
                values.append(value)

    def _compare(self, order: Order, outcome: Outcome) -> None:
        """Compare a request of the known set with the reference, up to where the stream ended."""
        if order.known is None or not outcome.answer.token_ids:
            return
        reference, got = self._answers[order.known], outcome.answer
        if outcome.ending is Ending.DONE:
            self._tally.compared += 1
            same = reference == got
        else:
            self._tally.prefixes += 1
            same = reference.text.startswith(got.text)
            same = same and reference.token_ids[: len(got.token_ids)] == got.token_ids
        if not same:
            self._tally.differing += 1
            self._tally.note_problem(
                f"known request {order.known} differs from the reference: "
                f"{got.text[:80]!r} instead of {reference.text[:80]!r}"
            )
