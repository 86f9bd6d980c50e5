"""The types of the public API, for type checkers; running these tests is a smoke test."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, assert_type

import pytest

from runner_client import (
    AsyncChatStream,
    AsyncCompletionStream,
    AsyncPendingLoad,
    AsyncRunnerClient,
    AsyncRunnerProcess,
    AsyncStatusStream,
    ChatChunk,
    ChatCompletion,
    ChatMessage,
    ChatStream,
    Completion,
    CompletionChunk,
    CompletionStream,
    DoneReason,
    LoadEstimate,
    LoadResult,
    MemoryEstimate,
    Model,
    PendingLoad,
    RenderedChat,
    RunnerClient,
    RunnerProcess,
    State,
    Status,
    StatusStream,
    TokenLogprob,
)
from runner_client.testing import FakeRunner, fake_runner


@pytest.fixture
def runner() -> Iterator[FakeRunner]:
    with fake_runner() as fake:
        yield assert_type(fake, FakeRunner)


def test_the_sync_client_has_precise_types(runner: FakeRunner) -> None:
    with RunnerClient(runner.address) as client:
        assert_type(client, RunnerClient)
        assert_type(client.load("m", dtype="float32"), LoadResult)
        assert_type(client.status(), Status)
        assert_type(client.status().state, State)
        assert_type(client.status().model, Model | None)
        assert_type(client.tokenize("x"), list[int])
        assert_type(client.detokenize([1]), str)
        assert_type(client.complete([1, 2]), Completion)
        assert_type(client.is_serving(), bool)
        assert_type(client.ping(), float)
        assert_type(client.estimate("m", dtype="auto_or_stored"), LoadEstimate)
        assert_type(client.estimate("m").fits, bool)
        assert_type(client.estimate("m").notes, tuple[str, ...])
        assert_type(client.trim(prefix_cache_bytes=1), int)
        assert_type(client.unload(), int)
        with assert_type(client.completion("x"), CompletionStream):
            pass
        with assert_type(client.watch_status(interval_seconds=1), StatusStream) as statuses:
            assert_type(next(statuses), Status)
        client.load("m")
        with assert_type(client.chat([ChatMessage("user", "x")]), ChatStream) as answer:
            assert_type(next(answer), ChatChunk)
        assert_type(client.complete_chat([ChatMessage("user", "x")]), ChatCompletion)
        assert_type(client.render_chat([ChatMessage("user", "x")]), RenderedChat)
        for chunk in client.completion("x"):
            assert_type(chunk, CompletionChunk)
            assert_type(chunk.token_ids, tuple[int, ...])
            assert_type(chunk.logprobs, tuple[TokenLogprob, ...])
            assert_type(chunk.done_reason, DoneReason | None)


async def test_the_async_client_has_precise_types(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        assert_type(client, AsyncRunnerClient)
        assert_type(await client.load("m", dtype="float32"), LoadResult)
        assert_type(await client.status(), Status)
        assert_type(await client.tokenize("x"), list[int])
        assert_type(await client.detokenize([1]), str)
        assert_type(await client.complete([1, 2]), Completion)
        assert_type(await client.estimate("m"), LoadEstimate)
        assert_type(await client.trim(), int)
        assert_type(await client.is_serving(), bool)
        assert_type(await client.ping(), float)
        async with assert_type(client.watch_status(), AsyncStatusStream) as statuses:
            assert_type(await anext(statuses), Status)
        async with assert_type(client.completion("x"), AsyncCompletionStream) as stream:
            async for chunk in stream:
                assert_type(chunk, CompletionChunk)
        async with assert_type(client.chat([ChatMessage("user", "x")]), AsyncChatStream) as answer:
            async for part in answer:
                assert_type(part, ChatChunk)
        assert_type(await client.complete_chat([ChatMessage("user", "x")]), ChatCompletion)
        assert_type(await client.unload(), int)


def test_a_process_has_precise_types() -> None:
    runner = RunnerProcess("model")
    assert_type(runner.pid, int | None)
    assert_type(runner.address, str | None)
    assert_type(runner.token, str | None)
    assert_type(runner.estimate, MemoryEstimate | None)
    assert_type(runner.vram_by_gpu(0), int)
    assert_type(AsyncRunnerProcess("model").has_exited, bool)


if TYPE_CHECKING:

    def sync_process(runner: RunnerProcess) -> None:
        """Check the types of calls on a running process; never executed."""
        assert_type(runner.client, RunnerClient)
        assert_type(runner.client.start_load("m", parallel=2), PendingLoad)
        assert_type(runner.load(), MemoryEstimate)
        assert_type(runner.wait_until_running(), LoadResult)
        assert_type(runner.restart(), LoadResult)
        assert_type(runner.completion("x"), CompletionStream)
        assert_type(runner.chat([ChatMessage("user", "x")]), ChatStream)
        assert_type(runner.complete("x"), Completion)
        assert_type(runner.trim(), int)

    async def async_process(runner: AsyncRunnerProcess) -> None:
        """Check the types of asyncio calls on a running process; never executed."""
        assert_type(runner.client, AsyncRunnerClient)
        assert_type(runner.client.start_load("m"), AsyncPendingLoad)
        assert_type(await runner.load(), MemoryEstimate)
        assert_type(await runner.wait_until_running(), LoadResult)
        assert_type(runner.completion("x"), AsyncCompletionStream)
        assert_type(runner.chat([ChatMessage("user", "x")]), AsyncChatStream)
        assert_type(await runner.complete("x"), Completion)
        assert_type(await runner.trim(), int)
