"""Measurement of a runner's peak memory."""

from __future__ import annotations

import asyncio
import os
import random
from dataclasses import dataclass
from pathlib import Path

from runner_client import AsyncRunnerProcess, MemoryEstimate, Options
from runner_client.types import Dtype

BLAS_VARIABLE = "MEMORY_BLAS"
"""Environment variable with the ``blas`` argument of the runner; ``auto`` if not set."""

_IDLE_SECONDS = 5.0
_PROMPT_SHARE = 0.25
"""Share of the context used by the prompt. The rest is generated, so that all streams overlap."""


@dataclass(frozen=True)
class Setting:
    """Settings a model is hosted with.

    Attributes:
        dtype: Dtype of the weights in memory.
        parallel: Number of concurrent streams.
        context_length: Length that each stream reaches, in tokens.
        prefix_cache_bytes: Limit of the prefix cache; None for the default.
        waits_idle: Also measure the process after an idle period.
        kv_bits: Bits of a number in the KV caches.
    """

    dtype: Dtype = "auto"
    parallel: int = 8
    context_length: int = 512
    prefix_cache_bytes: int | None = 0
    waits_idle: bool = False
    kv_bits: int = 0


@dataclass(frozen=True)
class Measured:
    """Memory of one runner, in bytes.

    Attributes:
        estimate: Estimate made before the load.
        peak_bytes: Peak resident set of the process.
        mlx_peak_bytes: Peak size of MLX's arrays.
        limit_bytes: Memory limit in force.
        loaded_bytes: Resident set after the load.
        idle_bytes: Resident set a few seconds after the last stream; 0 if not measured.
        prefix_bytes: Size of the prefix cache after the last stream.
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
        """Ratio of peak to estimate."""
        return self.peak_bytes / self.estimate.total_bytes


def measure(model: Path, setting: Setting) -> Measured:
    """Host a model in a new process and run every stream to the end of the context."""
    return asyncio.run(_measure(model, setting))


async def _measure(model: Path, setting: Setting) -> Measured:
    runner = AsyncRunnerProcess(
        str(model),
        context_length=setting.context_length,
        parallel=setting.parallel,
        dtype=setting.dtype,
        prefix_cache_bytes=setting.prefix_cache_bytes,
        allow_inexact=True,
        kv_bits=setting.kv_bits,
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
    """Fill the context of every stream, with distinct prompts and end of text suppressed."""
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
