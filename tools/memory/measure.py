"""Measure the peak of a runner's process against its estimate."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass
from pathlib import Path

from runner_client import AsyncRunnerProcess, MemoryEstimate, Options
from runner_client.types import Dtype

BLAS_VARIABLE = "MEMORY_BLAS"
"""The BLAS to measure with, as ``RunnerProcess(blas=...)`` has it; ``auto`` if it is not set."""

_IDLE_SECONDS = 5.0
_PROMPT_SHARE = 0.25
"""Of the context; the rest is generated, so that all streams run before the first one ends."""


@dataclass(frozen=True)
class Setting:
    """How a model is hosted.

    Attributes:
        dtype: The format of its weights.
        parallel: Streams that run together.
        context_length: Tokens that each of them comes to.
        prefix_cache_bytes: The most for evaluated prompts; None for the default.
        waits_idle: Whether the process is also measured when it has been idle.
    """

    dtype: Dtype = "auto"
    parallel: int = 8
    context_length: int = 512
    prefix_cache_bytes: int | None = 0
    waits_idle: bool = False


@dataclass(frozen=True)
class Measured:
    """What one runner took, in bytes.

    Attributes:
        estimate: What was estimated before.
        peak_bytes: The highest resident set of the process.
        mlx_peak_bytes: The highest that MLX held in arrays.
        limit_bytes: The limit that was in force.
        loaded_bytes: The resident set after the load.
        idle_bytes: The resident set some seconds after the last stream; 0 if not measured.
        prefix_bytes: Of it, evaluated prompts.
    """

    estimate: MemoryEstimate
    peak_bytes: int
    mlx_peak_bytes: int
    limit_bytes: int
    loaded_bytes: int
    idle_bytes: int = 0
    prefix_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Peak over estimate."""
        return self.peak_bytes / self.estimate.total_bytes


def measure(model: Path, setting: Setting) -> Measured:
    """Run every stream of a model to the end of its context, in a process of its own."""
    return asyncio.run(_measure(model, setting))


async def _measure(model: Path, setting: Setting) -> Measured:
    runner = AsyncRunnerProcess(
        str(model),
        context_length=setting.context_length,
        parallel=setting.parallel,
        dtype=setting.dtype,
        prefix_cache_bytes=setting.prefix_cache_bytes,
        allow_inexact=True,
        blas=os.environ.get(BLAS_VARIABLE, "auto"),
    )
    async with runner:
        pid, need = runner.pid, runner.estimate
        if pid is None or need is None:
            raise RuntimeError(f"the runner of {model} did not start")
        loaded = _resident(pid)
        await _fill(runner, setting)
        usage = (await runner.status()).memory_usage
        peak = _field(pid, "VmHWM")
        idle = 0
        if setting.waits_idle:
            await asyncio.sleep(_IDLE_SECONDS)
            idle = _resident(pid)
    return Measured(
        estimate=need,
        peak_bytes=peak,
        mlx_peak_bytes=usage.peak_bytes,
        limit_bytes=usage.limit_bytes,
        loaded_bytes=loaded,
        idle_bytes=idle,
        prefix_bytes=usage.prefix_cache_bytes,
    )


async def _fill(runner: AsyncRunnerProcess, setting: Setting) -> None:
    """Let every stream fill its context: different prompts, no end of text."""
    model = (await runner.status()).model
    if model is None:
        raise RuntimeError("the runner has no model")
    draw = random.Random(1)
    ends = dict.fromkeys(model.eos_token_ids, -100.0)
    options = Options(num_predict=setting.context_length, logit_bias=ends, temperature=0.8)
    count = int(setting.context_length * _PROMPT_SHARE)
    prompts = [
        [draw.randrange(model.vocab_size) for _ in range(count)] for _ in range(setting.parallel)
    ]
    await asyncio.gather(*(runner.complete(prompt, options=options) for prompt in prompts))


def _resident(pid: int) -> int:
    return _field(pid, "VmRSS")


def _field(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(name)
