"""A soak run from start to end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import psutil

from mlxrunner.v1 import runner_pb2 as pb
from mlxrunner.v1 import runner_pb2_grpc
from soak.drive import Driver
from soak.follow import Follower
from soak.mix import Corpus, Mix, known_set, source_texts
from soak.records import Answer, Ending, Order, Sample, SoakError, Tally
from soak.sample import Sampler
from soak.server import MAX_QUEUED, PARALLEL, PREFIX_CACHE_BYTES, Runner, is_serving, running

if TYPE_CHECKING:
    # Exists only in the type stubs.
    from mlxrunner.v1.runner_pb2_grpc import RunnerServiceAsyncStub

logger = logging.getLogger("soak")

KNOWN_COUNT = 16
IDLE_SECONDS = 10.0
"""Time limit for the server to become idle after the last stream."""

_CALL_SECONDS = 30.0
_SETTLE_SECONDS = 3.0
_PACKAGES = ("mlx-grpc-runner", "mlx", "mlx-lm", "grpcio", "protobuf")


@dataclass(frozen=True)
class Settings:
    """Settings of a soak.

    Attributes:
        seconds: Duration of the load.
        seed: Seed of every random choice.
    """

    seconds: float
    seed: int = 0


@dataclass
class Run:
    """Results of a soak.

    Attributes:
        settings: Settings of the soak.
        about: Machine, versions and time of the run.
        tally: Outcomes of the streams.
        samples: Samples taken once a second.
        idle_seconds: Time from the end of the last stream until the server was idle; None if
            busy after ``IDLE_SECONDS``.
        still_same: Number of requests of the known set that reproduced the reference after the
            load.
        is_serving: Whether the health service reported SERVING after the load.
        exit_code: Exit code of the runner after SIGINT; None if it had to be killed.
        tracebacks: Number of tracebacks in the runner's log.
        left_open: File descriptors open after the load, minus those open before.
    """

    settings: Settings
    about: dict[str, Any] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)
    samples: list[Sample] = field(default_factory=list)
    idle_seconds: float | None = None
    still_same: int = 0
    is_serving: bool = False
    exit_code: int | None = None
    tracebacks: int = 0
    left_open: int | None = None


async def soak(settings: Settings, log: Path) -> Run:
    """Run a soak, including start and stop of the runner.

    Args:
        settings: Settings of the soak.
        log: File that receives the runner's stderr.

    Raises:
        SoakError: The load could not start.
    """
    run = Run(settings)
    async with running(log) as runner:
        async with runner.dial() as channel:
            stub = runner_pb2_grpc.RunnerServiceStub(channel)
            run.about = await _about(stub)
            corpus = await _corpus(stub)
            known = known_set(corpus, settings.seed, KNOWN_COUNT)
            answers = await _reference_answers(stub, known)
            logger.info("reference answers recorded; starting %.0f s of load", settings.seconds)
            mix = Mix(corpus, settings.seed, known)
            driver = Driver(runner, mix, run.tally, answers, settings.seed)
            descriptors = runner.os_process.num_fds()
            await _load(run, runner, channel, driver)
            if runner.is_alive:
                await _afterwards(run, channel, known, answers)
                run.left_open = await _left_open(runner, descriptors)
        run.exit_code = await runner.stop()
    run.tracebacks = count_tracebacks(log)
    return run


def count_tracebacks(log: Path) -> int:
    """Count the tracebacks in a log."""
    return log.read_text(errors="replace").count("Traceback (most recent call last)")


async def _load(run: Run, runner: Runner, channel: grpc.aio.Channel, driver: Driver) -> None:
    sampler = Sampler(runner, channel, run.tally)
    sampling = asyncio.create_task(sampler.run())
    try:
        await driver.run(run.settings.seconds)
    finally:
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
    # Samples taken while the last streams drain do not represent the load.
    run.samples = [each for each in sampler.samples if each.seconds <= run.settings.seconds]


async def _afterwards(
    run: Run,
    channel: grpc.aio.Channel,
    known: Sequence[pb.CompletionRequest],
    answers: Sequence[Answer],
) -> None:
    """Check that the server is idle and healthy, and repeat the known set."""
    stub = runner_pb2_grpc.RunnerServiceStub(channel)
    try:
        run.idle_seconds = await _until_idle(stub)
        run.is_serving = await is_serving(channel)
        again = await _reference_answers(stub, known)
    except (SoakError, grpc.aio.AioRpcError) as error:
        run.tally.note_problem(f"after the load: {error}")
    else:
        run.still_same = sum(a == b for a, b in zip(answers, again, strict=True))


async def _until_idle(stub: RunnerServiceAsyncStub) -> float | None:
    loop = asyncio.get_running_loop()
    begin = loop.time()
    while loop.time() < begin + IDLE_SECONDS:
        status = await stub.Status(pb.StatusRequest(), timeout=_CALL_SECONDS)
        if not (status.running_count or status.queued_count):
            return loop.time() - begin
        await asyncio.sleep(0.01)
    return None


async def _left_open(runner: Runner, before: int) -> int:
    """Return the lowest number of descriptors above ``before`` within ``_SETTLE_SECONDS``."""
    # Close connections kept alive by reference cycles, as the sampler does.
    gc.collect()
    count = runner.os_process.num_fds()
    for _ in range(int(_SETTLE_SECONDS / 0.1)):
        if count <= before:
            break
        await asyncio.sleep(0.1)
        count = min(count, runner.os_process.num_fds())
    return count - before


async def _corpus(stub: RunnerServiceAsyncStub) -> Corpus:
    texts = source_texts()
    ids = []
    for text in texts:
        request = pb.TokenizeRequest(content=text)
        ids.append(list((await stub.Tokenize(request, timeout=_CALL_SECONDS)).token_ids))
    status = await stub.Status(pb.StatusRequest(), timeout=_CALL_SECONDS)
    return Corpus(texts, ids, status.model.vocab_size, status.context_length)


async def _reference_answers(
    stub: RunnerServiceAsyncStub, known: Sequence[pb.CompletionRequest]
) -> list[Answer]:
    """Return the answers of the known set, one request at a time.

    Raises:
        SoakError: A request failed.
    """
    answers = []
    for request in known:
        outcome = await Follower(Order(request), lambda _count: None).run(stub)
        if outcome.ending is not Ending.DONE or outcome.problem:
            raise SoakError(f"a reference request failed: {outcome.ending.value} {outcome.problem}")
        answers.append(outcome.answer)
    return answers


async def _about(stub: RunnerServiceAsyncStub) -> dict[str, Any]:
    status = await stub.Status(pb.StatusRequest(), timeout=_CALL_SECONDS)
    return {
        "device": status.device,
        "blas": status.blas,
        **describe(),
        "model": status.model.name,
        "parallel": PARALLEL,
        "max_queued": MAX_QUEUED,
        "prefix_cache_bytes": PREFIX_CACHE_BYTES,
    }


def describe() -> dict[str, Any]:
    """Describe machine, versions and time of a run."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "cores": psutil.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "load_average": [round(each, 2) for each in os.getloadavg()],
    }
