"""One soak from start to end."""

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
    # The stubs know it only by its types.
    from mlxrunner.v1.runner_pb2_grpc import RunnerServiceAsyncStub

logger = logging.getLogger("soak")

KNOWN_COUNT = 16
IDLE_SECONDS = 10.0
"""Within this after the last stream the server has to have nothing to do."""

_CALL_SECONDS = 30.0
_SETTLE_SECONDS = 3.0
_PACKAGES = ("mlx-grpc-runner", "mlx", "mlx-lm", "grpcio", "protobuf")


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        seconds: How long requests are sent.
        seed: Of everything that is drawn.
    """

    seconds: float
    seed: int = 0


@dataclass
class Run:
    """What a soak came to.

    Attributes:
        settings: What was run.
        about: The machine, versions and the time.
        tally: How the streams ended.
        samples: One a second.
        idle_seconds: From the last stream's end until the server had nothing to do; None
            if it still had after ``IDLE_SECONDS``.
        still_same: Of the known set, how many gave their text once more, alone, at the end.
        is_serving: What health said at the end.
        exit_code: Of the runner, asked to stop; None if it had to be killed.
        tracebacks: In the runner's log.
        left_open: How many descriptors more were open when all was over than before the load.
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
    """Runs a soak; the runner is gone afterwards.

    Args:
        settings: What to run.
        log: Where the runner's standard error goes.

    Raises:
        SoakError: It could not begin.
    """
    run = Run(settings)
    async with running(log) as runner:
        async with runner.dial() as channel:
            stub = runner_pb2_grpc.RunnerServiceStub(channel)
            run.about = await _about(stub)
            corpus = await _corpus(stub)
            known = known_set(corpus, settings.seed, KNOWN_COUNT)
            answers = await _alone(stub, known)
            logger.info("the known set is read; %.0f s of load begin", settings.seconds)
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
    """How often something was raised that nobody expected."""
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
    # Those taken while the last streams end are of another load.
    run.samples = [each for each in sampler.samples if each.seconds <= run.settings.seconds]


async def _afterwards(
    run: Run,
    channel: grpc.aio.Channel,
    known: Sequence[pb.CompletionRequest],
    answers: Sequence[Answer],
) -> None:
    """Looks whether the server is idle, healthy, and gives the same texts as before."""
    stub = runner_pb2_grpc.RunnerServiceStub(channel)
    try:
        run.idle_seconds = await _until_idle(stub)
        run.is_serving = await is_serving(channel)
        again = await _alone(stub, known)
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
    """How many descriptors are open beyond those before, once it does not become fewer."""
    # As the sampler does.
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


async def _alone(
    stub: RunnerServiceAsyncStub, known: Sequence[pb.CompletionRequest]
) -> list[Answer]:
    """What each of the known set gives with nothing beside it.

    Raises:
        SoakError: One of them failed.
    """
    answers = []
    for request in known:
        outcome = await Follower(Order(request), lambda _count: None).run(stub)
        if outcome.ending is not Ending.DONE or outcome.problem:
            raise SoakError(f"a request alone: {outcome.ending.value} {outcome.problem}")
        answers.append(outcome.answer)
    return answers


async def _about(stub: RunnerServiceAsyncStub) -> dict[str, Any]:
    status = await stub.Status(pb.StatusRequest(), timeout=_CALL_SECONDS)
    return {
        "time": datetime.now(UTC).isoformat(timespec="minutes"),
        "device": status.device,
        "blas": status.blas,
        "cores": psutil.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "model": status.model.name,
        "parallel": PARALLEL,
        "max_queued": MAX_QUEUED,
        "prefix_cache_bytes": PREFIX_CACHE_BYTES,
        "load_average": [round(each, 2) for each in os.getloadavg()],
    }
