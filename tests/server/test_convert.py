"""The engine's counters of prefix cache and memory in the protocol's messages."""

from __future__ import annotations

import sys

import pytest

from runner_server.api.convert import delta_message, memory_message
from runner_server.engine.types import FinishReason, GenerationResult, MemoryCounters, OutputDelta
from support.harness import Server


def test_the_last_message_counts_cached_tokens() -> None:
    done = GenerationResult(FinishReason.STOP, "", 9, 3, 0.0, 0.0, 0.0, cached_count=5)
    message = delta_message(OutputDelta(done=done))
    assert (message.prompt_eval_count, message.prompt_cached_count) == (9, 5)


async def test_status_has_the_bytes_of_the_prefix_cache(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    counters = MemoryCounters(active_bytes=2**40, cache_bytes=1, prefix_cache_bytes=2**33)
    monkeypatch.setattr(server.backend, "memory", lambda: counters)
    status = await server.status()
    assert status.memory_usage.prefix_cache_bytes == 2**33
    assert status.memory == 2**40 + 1


@pytest.mark.parametrize(
    ("device", "system", "process", "other"),
    [
        ("cpu: EPYC", "linux", 100, 70),
        ("gpu: Apple M4", "darwin", 100, 70),
        # A GPU's own memory is not part of the resident set.
        ("gpu: NVIDIA H100", "linux", 100, 100),
        # Allocated pages that were never written are in no resident set.
        ("cpu: EPYC", "linux", 25, 0),
        ("", "linux", 100, 70),
    ],
)
def test_other_bytes_are_the_resident_set_outside_mlx(
    monkeypatch: pytest.MonkeyPatch, device: str, system: str, process: int, other: int
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    message = memory_message(MemoryCounters(20, 10, 40), process, device=device)
    assert message.other_bytes == other


async def test_status_has_the_limits_in_force(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.load(prefix_cache_bytes=50)
    counters = MemoryCounters(9, 1, 9, prefix_cache_bytes=7, prefix_cache_limit_bytes=40)
    monkeypatch.setattr(server.backend, "memory", lambda: counters)
    usage = (await server.status()).memory_usage
    assert (usage.prefix_cache_bytes, usage.prefix_cache_limit_bytes) == (7, 40)
    assert usage.other_bytes == usage.process_bytes - 10
