"""The figures of Status about KV caches and rates."""

from __future__ import annotations

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import CONTEXT_LENGTH, PREFILL_CHUNK, TOKEN_BYTES, FakeBackend
from support.harness import Server, StartServer, eventually

SEQUENCE_BYTES = CONTEXT_LENGTH * TOKEN_BYTES


async def step(server: Server) -> None:
    """Run the step that waits at the gate, and wait until the next one does."""
    gate = server.backend.step_gate
    gate.allow()
    await eventually(lambda: gate._permits == 0)
    await server.thread(gate.wait_arrival)


async def test_without_a_model_all_figures_are_zero(server: Server) -> None:
    status = await server.status()
    assert (status.kv_token_count, status.kv_token_capacity) == (0, 0)
    assert (status.prefix_cached_ratio, status.tokens_per_second) == (0, 0)


async def test_tokens_of_prompts_and_output_are_counted(loaded: Server) -> None:
    gate = loaded.backend.step_gate
    gate.shut()
    # With the first token of every prompt it has 20; the first decode step processes the last.
    call = loaded.start("x" * 19, num_predict=10)
    await loaded.thread(gate.wait_arrival)
    assert (await loaded.status()).kv_token_count == 0
    counts = []
    for _ in range(5):
        await step(loaded)
        counts.append((await loaded.status()).kv_token_count)
    assert 0 < counts[0] <= PREFILL_CHUNK < counts[1] < counts[2]
    assert counts[2:] == [19, 20, 21]
    gate.open()
    assert [message async for message in call][-1].eval_count == 10
    await loaded.settled()
    assert (await loaded.status()).kv_token_count == 0


async def test_queued_completions_hold_no_tokens(server: Server) -> None:
    await server.load(parallel=1)
    gate = server.backend.step_gate
    gate.shut()
    calls = [server.start("x" * 100) for _ in range(3)]
    await eventually(lambda: server.view.request_count == 3)
    await server.thread(gate.wait_arrival)
    await step(server)
    assert 0 < (await server.status()).kv_token_count <= PREFILL_CHUNK
    for call in calls:
        call.cancel()


@pytest.mark.parametrize(
    ("budget", "parallel", "tokens"),
    [
        (SEQUENCE_BYTES, 4, CONTEXT_LENGTH),
        (5 * SEQUENCE_BYTES // 2, 4, 5 * CONTEXT_LENGTH // 2),
        (100 * SEQUENCE_BYTES, 4, 4 * CONTEXT_LENGTH),
        (100 * SEQUENCE_BYTES, 1, CONTEXT_LENGTH),
    ],
)
async def test_the_capacity_is_what_fits_the_budget_and_the_slots(
    start_server: StartServer, budget: int, parallel: int, tokens: int
) -> None:
    server = await start_server(FakeBackend(kv_budget_bytes=budget))
    await server.load(parallel=parallel)
    assert (await server.status()).kv_token_capacity == tokens


async def test_tokens_are_counted_since_the_load(loaded: Server) -> None:
    assert (await loaded.status()).tokens_per_second == 0
    await loaded.complete(num_predict=100)
    rate = (await loaded.status()).tokens_per_second
    assert rate > 0
    await loaded.load()
    assert (await loaded.status()).tokens_per_second == 0
    await loaded.stub.Unload(pb.UnloadRequest())
    assert (await loaded.status()).tokens_per_second == 0
