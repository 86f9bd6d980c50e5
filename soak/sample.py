"""Sampling of the runner once a second, from ``Status`` and from the operating system."""

from __future__ import annotations

import asyncio
import gc

import grpc
import psutil

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from soak.records import Sample, Tally
from soak.server import Runner

INTERVAL_SECONDS = 1.0
STATUS_TIMEOUT_SECONDS = 10.0
_COLLECT_EVERY = 10


class Sampler:
    """Periodic sampler of a runner.

    Args:
        runner: Runner to sample.
        channel: Connection used only for ``Status``.
        tally: Provides the token count; receives failed samples as problems.

    Attributes:
        samples: Samples in chronological order.
    """

    def __init__(self, runner: Runner, channel: grpc.aio.Channel, tally: Tally) -> None:
        self._runner = runner
        self._stub = runner_pb2_grpc.RunnerServiceStub(channel)
        self._tally = tally
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """Take a sample every second until cancelled."""
        loop = asyncio.get_running_loop()
        begin = last = loop.time()
        tokens = self._tally.tokens
        while True:
            await asyncio.sleep(INTERVAL_SECONDS - (loop.time() - begin) % INTERVAL_SECONDS)
            if len(self.samples) % _COLLECT_EVERY == 0:
                # Closed grpc.aio channels are in reference cycles and keep their connections open
                # until collected, which would look like a leak in the server.
                gc.collect()
            asked = loop.time()
            try:
                status = await self._stub.Status(pb.StatusRequest(), timeout=STATUS_TIMEOUT_SECONDS)
                now = loop.time()
                rate = (self._tally.tokens - tokens) / (now - last)
                self.samples.append(self._sample(status, now - begin, rate, now - asked))
                last, tokens = now, self._tally.tokens
            except (grpc.aio.AioRpcError, psutil.Error) as error:
                self._tally.note_problem(f"a sample failed: {error}")

    def _sample(
        self, status: pb.StatusResponse, seconds: float, rate: float, took: float
    ) -> Sample:
        process, memory = self._runner.os_process, status.memory_usage
        with process.oneshot():
            return Sample(
                seconds=round(seconds, 3),
                tokens_per_second=round(rate, 1),
                running=status.running_count,
                queued=status.queued_count,
                rss_bytes=process.memory_info().rss,
                active_bytes=memory.active_bytes,
                cache_bytes=memory.cache_bytes,
                prefix_bytes=memory.prefix_cache_bytes,
                status_seconds=round(took, 6),
                threads=process.num_threads(),
                descriptors=process.num_fds(),
            )
