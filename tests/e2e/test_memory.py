"""Memory taken and released by the process of a runner, measured from outside."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.server_child import Child, running

pytest.importorskip("mlx.core", reason="mlx is not installed (the server extra)")
pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set from /proc"),
]

from runner_client import (  # noqa: E402
    AsyncRunnerClient,
    AsyncRunnerProcess,
    ChatMessage,
    Options,
    RunnerProcess,
)
from runner_client.errors import LoadRequiresFullError  # noqa: E402
from runner_client.memory.estimation import estimate  # noqa: E402
from support.sweeps import sampled  # noqa: E402
from support.tokenizer_files import write_large_tokenizer  # noqa: E402
from tools.memory.models import scaled, write_model  # noqa: E402

Build = Callable[..., Path]
MIB = 1 << 20
IDLE_SECONDS = 5.0
CONTEXT = 256
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 128}
"""8 KiB of KV cache per token: 16 MiB for 8 sequences. Heads are wide, as contexts take longer."""
SWAPPED = (
    *("llama", "qwen3", "gemma3_text", "mamba2", "deepseek_v3", "qwen3_moe", "lfm2", "phi3"),
    *("granitemoehybrid", "gpt2", "olmo2", "falcon_h1"),
)


def process_bytes(pid: int | None, name: str = "VmRSS") -> int:
    """Return the resident set from /proc, or the peak of the resident set with VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(name)


def wait_below(pid: int | None, limit: int, seconds: float) -> None:
    """Wait until the resident set is at most ``limit``; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while process_bytes(pid) > limit:
        assert time.monotonic() < end, f"{process_bytes(pid) / MIB:.0f} of {limit / MIB:.0f} MiB"
        time.sleep(0.05)


async def fill(runner: AsyncRunnerProcess, streams: int, seed: int = 1) -> None:
    """Fill the contexts of concurrent streams with different prompts."""
    options = Options(num_predict=CONTEXT - 72, logit_bias={0: -100.0})
    prompts = [[1 + (seed + 7 * row + i) % 400 for i in range(64)] for row in range(streams)]
    await asyncio.gather(*(runner.complete(prompt, options=options) for prompt in prompts))


@pytest.mark.parametrize(
    ("prefix_cache_bytes", "kv_bits"),
    sampled([(0, 0), (None, 0), (24 * MIB, 0), (None, 4)], [(None, 0), (None, 4)]),
    ids=["off", "default", "fixed", "quantized"],
)
async def test_the_estimate_holds_and_an_idle_runner_frees_its_heap(
    model_dir: Build, prefix_cache_bytes: int | None, kv_bits: int
) -> None:
    async with AsyncRunnerProcess(
        str(model_dir(**WIDE)),
        parallel=8,
        context_length=CONTEXT,
        prefix_cache_bytes=prefix_cache_bytes,
        kv_bits=kv_bits,
    ) as runner:
        loaded = process_bytes(runner.pid)
        await fill(runner, 8)
        status, estimate = await runner.status(), runner.estimate
        assert status.model
        assert estimate
        assert status.model.kv_bits == kv_bits
        # A scale and a bias in float32 for 64 numbers of half a byte.
        numbers = 8 * CONTEXT * 4 * 2 * 2 * 128
        assert estimate.kv_bytes == numbers * (0.625 if kv_bits else 4)
        own = await runner.client.estimate(
            runner.model_path,
            parallel=8,
            context_length=CONTEXT,
            prefix_cache_bytes=prefix_cache_bytes,
            kv_bits=kv_bits,
        )
        assert own.total_bytes == estimate.total_bytes
        usage = status.memory_usage
        peak = process_bytes(runner.pid, "VmHWM")
        assert 0.6 * estimate.total_bytes <= peak <= estimate.total_bytes
        assert usage.peak_bytes <= usage.limit_bytes
        kept = (await runner.status()).memory_usage.prefix_cache_bytes
        wait_below(runner.pid, int(1.1 * loaded) + 32 * MIB + kept, IDLE_SECONDS)


async def test_the_estimate_counts_a_large_tokenizer(model_dir: Build, tmp_path: Path) -> None:
    """Reading the tokenizer takes 360 MiB, of which 100 MiB remain."""
    path = Path(shutil.copytree(model_dir(**WIDE), tmp_path / "model"))
    write_large_tokenizer(path)
    async with AsyncRunnerProcess(str(path), parallel=2, context_length=CONTEXT) as runner:
        loaded = process_bytes(runner.pid)
        estimate = runner.estimate
        assert estimate
        peak = process_bytes(runner.pid, "VmHWM")
        assert peak > loaded + 150 * MIB
        assert 0.6 * estimate.total_bytes <= peak <= estimate.total_bytes
        assert loaded <= estimate.total_bytes - estimate.load_transient_bytes


async def test_the_estimate_counts_the_process_of_chat_templates(
    model_dir: Build, tmp_path: Path
) -> None:
    """The pages of libraries that both processes map are in memory once."""
    path = Path(shutil.copytree(model_dir(**WIDE), tmp_path / "model"))
    (path / "chat_template.jinja").write_text("{{ messages | tojson }}")
    async with AsyncRunnerProcess(str(path), parallel=2, context_length=CONTEXT) as runner:
        assert not psutil.Process(runner.pid).children()
        await runner.client.render_chat([ChatMessage("user", "word " * 1000)])
        (worker,) = psutil.Process(runner.pid).children()
        taken = worker.memory_full_info().uss
        estimate = runner.estimate
        assert estimate
        assert 5 * MIB <= taken <= 20 * MIB
        peak = process_bytes(runner.pid, "VmHWM") + taken
        assert 0.6 * estimate.total_bytes <= peak <= estimate.total_bytes


async def test_the_memory_limit_holds_under_load(model_dir: Build) -> None:
    """A lower limit runs fewer requests at once; the memory of MLX stays within the limit."""
    path = model_dir(**WIDE)
    async with (
        AsyncRunnerProcess(str(path), parallel=8, context_length=CONTEXT) as runner,
        AsyncRunnerClient(runner.address or "", token=runner.token) as client,
    ):
        lower = (await runner.status()).memory_usage.limit_bytes - 12 * MIB
        await client.load(str(path), parallel=8, context_length=CONTEXT, memory_limit_bytes=lower)
        for seed in range(2):
            await fill(runner, 8, seed)
        usage = (await runner.status()).memory_usage
        assert usage.limit_bytes <= lower
        assert usage.peak_bytes <= usage.limit_bytes


@pytest.mark.parametrize(
    ("prompt", "count"), sampled([(8, 4), (1000, 4)], [(1000, 4)]), ids=["short", "full"]
)
async def test_the_memory_limit_holds_for_a_large_vocabulary(
    model_dir: Build, prompt: int, count: int
) -> None:
    """The step of a short sequence takes as much memory as that of a long one.

    The limit leaves the KV budget the memory by which two sequences would just not fit.
    """
    vocabulary = 150_000
    path = str(model_dir("qwen3", vocab_size=vocabulary, num_key_value_heads=4, head_dim=128))
    options: dict[str, Any] = {"context_length": 1024, "prefix_cache_bytes": 0}
    two = estimate(path, parallel=2, **options)
    limit = two.weight_bytes + two.kv_bytes + two.working_bytes - 1
    costly = Options(
        num_predict=count,
        temperature=1.0,
        top_k=vocabulary - 1,
        top_p=0.9,
        repeat_penalty=1.2,
        presence_penalty=0.5,
        logit_bias={0: -100.0},
    )
    prompts = [[1 + (row + 7 * i) % 400 for i in range(prompt)] for row in range(4)]
    runner = AsyncRunnerProcess(path, parallel=16, memory_limit_bytes=limit, **options)
    async with runner:
        calls = (runner.complete(ids, options=costly, logprobs=20) for ids in prompts)
        await asyncio.gather(*calls)
        usage = (await runner.status()).memory_usage
        assert usage.peak_bytes <= usage.limit_bytes <= limit
        assert runner.estimate
        assert process_bytes(runner.pid, "VmHWM") <= runner.estimate.total_bytes


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    with running(tmp_path) as child:
        child.wait_for(lambda: bool(child.status().device))
        yield child


def test_loads_leave_no_memory_behind(child: Child, tmp_path: Path) -> None:
    """The first load of each type also leaves code of mlx_lm; the second must leave nothing."""
    models = [write_model(tmp_path / name, scaled(name)) for name in SWAPPED]
    fresh = process_bytes(child.process.pid)
    limits = [fresh + 16 * MIB]
    for _ in range(2):
        for model in models:
            child.load(model)
            assert list(child.complete(10))[-1].done
            child.stub.Unload(pb.UnloadRequest(), timeout=30)
        wait_below(child.process.pid, limits[-1], IDLE_SECONDS)
        limits.append(process_bytes(child.process.pid) + 3 * MIB)


def test_the_server_keeps_the_headroom_of_the_gate(model_dir: Build, tmp_path: Path) -> None:
    """Clients in other languages have no gate: ``Load`` refuses by the same numbers."""
    request = pb.LoadRequest(model=str(model_dir()), context_length=64, parallel=1)
    with running(tmp_path, MLX_RUNNER_GPU_OVERHEAD=str(1 << 50)) as child:
        about = pb.EstimateRequest(model=request.model, context_length=64, parallel=1)
        estimate = child.stub.Estimate(about, timeout=30)
        assert (estimate.fits, estimate.available_bytes) == (False, 0)
        with pytest.raises(Exception, match="are available") as caught:
            child.stub.Load(request, timeout=30)
        assert "RESOURCE_EXHAUSTED" in str(caught.value)
        request.memory_override = True
        loaded = child.stub.Load(request, timeout=30)
        assert loaded.model.weight_bytes == estimate.weight_bytes
        assert child.status().memory_usage.reserved_bytes >= estimate.required_bytes


def test_the_format_of_weights_never_changes_silently(model_dir: Build) -> None:
    with pytest.raises(LoadRequiresFullError, match="MLX_RUNNER_GPU_OVERHEAD"):
        RunnerProcess(
            str(model_dir(quantize_bits=4, dtype="bfloat16")),
            require_full=True,
            env={"MLX_RUNNER_GPU_OVERHEAD": str(1 << 50)},
        ).load()
