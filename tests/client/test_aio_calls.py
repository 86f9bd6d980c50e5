"""AsyncRunnerClient against the fake runner."""

from __future__ import annotations

import asyncio
import gc
import math
import socket
from collections.abc import Iterator

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_client import AsyncRunnerClient, errors
from runner_client.testing import Failure, FakeRunner, fake_runner
from runner_client.types import DoneReason, Options, State, Status, Timeouts


@pytest.fixture
def runner() -> Iterator[FakeRunner]:
    with fake_runner() as fake:
        yield fake


async def wait_in_thread(event: object) -> bool:
    """Wait in a worker thread for an event from a server thread."""
    return await asyncio.to_thread(event.wait, 10)  # type: ignore[attr-defined]  # an Event


async def test_a_completion_streams_its_chunks(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        chunks = [chunk async for chunk in client.completion("Hi")]
    assert [chunk.content for chunk in chunks] == ["Hello", " world", ""]
    assert chunks[-1].done_reason is DoneReason.STOP


async def test_a_finished_completion_is_not_cancelled(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        for _ in range(50):
            await client.complete("Hi")
        assert not runner.cancelled.is_set()


async def test_a_stream_left_open_after_its_last_message_is_cancelled(runner: FakeRunner) -> None:
    runner.ends_after_done = False
    async with AsyncRunnerClient(runner.address) as client:
        assert (await client.complete("Hi")).content == "Hello world"
        assert await wait_in_thread(runner.cancelled)


async def test_over_a_unix_socket() -> None:
    with fake_runner(listen="unix") as runner:
        async with AsyncRunnerClient(runner.address) as client:
            assert (await client.complete("Hi")).content == "Hello world"


async def test_the_request_carries_all_arguments(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        await client.complete([1, 2], options=Options(num_predict=3), logprobs=2, request_id="me")
    sent = pb.CompletionRequest(logprobs=2, request_id="me")
    sent.prompt_token_ids.ids.extend([1, 2])
    sent.options.num_predict = 3
    assert runner.requests == [sent]


async def test_leaving_the_block_cancels_on_the_server(runner: FakeRunner) -> None:
    runner.stall_after = 1
    async with AsyncRunnerClient(runner.address) as client:
        async with client.completion("Hi") as stream:
            await anext(stream)
        assert await wait_in_thread(runner.cancelled)


async def test_dropping_the_stream_cancels_on_the_server(runner: FakeRunner) -> None:
    runner.stall_after = 1
    async with AsyncRunnerClient(runner.address) as client:
        async for _ in client.completion("Hi"):
            break
        gc.collect()
        assert await wait_in_thread(runner.cancelled)


async def test_cancelling_the_reader_cancels_on_the_server(runner: FakeRunner) -> None:
    runner.stall_after = 1
    async with AsyncRunnerClient(runner.address) as client:
        stream = client.completion("Hi")
        await anext(stream)
        reader = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)  # let the reader start waiting
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert await wait_in_thread(runner.cancelled)


async def test_a_timeout_of_the_caller_raises_timeout_error(runner: FakeRunner) -> None:
    runner.stall_after = 0
    async with AsyncRunnerClient(runner.address) as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.complete("Hi")
        assert await wait_in_thread(runner.cancelled)


async def test_reading_after_a_cancel_raises_incomplete_stream(runner: FakeRunner) -> None:
    runner.stall_after = 0
    async with AsyncRunnerClient(runner.address) as client:
        stream = client.completion("Hi")
        asyncio.get_running_loop().call_later(0.05, stream.cancel)
        with pytest.raises(errors.IncompleteStreamError, match="cancelled by its reader"):
            await anext(stream)


async def test_a_stream_without_its_last_message_is_incomplete(runner: FakeRunner) -> None:
    runner.is_complete = False
    async with AsyncRunnerClient(runner.address) as client:
        with pytest.raises(errors.IncompleteStreamError, match="without its last message"):
            await client.complete("Hi")


async def test_a_failure_mid_stream_is_raised_after_the_text(runner: FakeRunner) -> None:
    runner.failure, runner.fail_after = Failure("GENERATION_FAILED"), 1
    async with AsyncRunnerClient(runner.address) as client:
        stream = client.completion("Hi")
        assert (await anext(stream)).content == "Hello"
        with pytest.raises(errors.GenerationFailedError):
            await anext(stream)


async def test_a_missing_first_token_times_out(runner: FakeRunner) -> None:
    runner.stall_after = 0
    timeouts = Timeouts(first_token_seconds=1.0)
    async with AsyncRunnerClient(runner.address, timeouts=timeouts) as client:
        # The limit must leave time for the request to arrive; only then can it be cancelled.
        await client.status()
        with pytest.raises(errors.RunnerTimeoutError) as caught:
            await client.complete("Hi")
        assert await wait_in_thread(runner.cancelled)
    assert (caught.value.phase, caught.value.timeout_seconds) == ("first_token", 1.0)


async def test_a_silent_stream_times_out(runner: FakeRunner) -> None:
    runner.stall_after = 1
    timeouts = Timeouts(idle_seconds=0.2)
    async with AsyncRunnerClient(runner.address, timeouts=timeouts) as client:
        with pytest.raises(errors.RunnerTimeoutError) as caught:
            await client.complete("Hi")
        assert await wait_in_thread(runner.cancelled)
    assert (caught.value.phase, caught.value.timeout_seconds) == ("idle", 0.2)


async def test_without_limits_nothing_times_out(runner: FakeRunner) -> None:
    runner.piece_delay_seconds = 0.05
    timeouts = Timeouts(first_token_seconds=None, idle_seconds=None)
    async with AsyncRunnerClient(runner.address, timeouts=timeouts) as client:
        assert (await client.complete("Hi")).content == "Hello world"


async def test_an_unanswered_call_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        async with AsyncRunnerClient(address, timeouts=Timeouts(call_seconds=0.2)) as client:
            with pytest.raises(errors.RunnerTimeoutError) as caught:
                await client.unload()
    assert (caught.value.phase, caught.value.timeout_seconds) == ("call", 0.2)


async def test_a_missing_runner_is_unavailable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    async with AsyncRunnerClient(address) as client:
        with pytest.raises(errors.RunnerUnavailableError, match=address):
            await client.status()
        with pytest.raises(errors.RunnerUnavailableError, match=address):
            await client.complete("Hi")


async def test_a_started_load_goes_on_after_a_timeout(runner: FakeRunner) -> None:
    runner.load_seconds = math.inf
    async with AsyncRunnerClient(runner.address, timeouts=Timeouts(load_seconds=0.5)) as client:
        load = client.start_load("org/name")
        for _ in range(2):
            with pytest.raises(errors.RunnerTimeoutError, match="no progress"):
                await load.wait()
        assert not runner.cancelled.is_set()
        await load.cancel()
        assert await asyncio.to_thread(runner.cancelled.wait, 10)


async def test_the_other_rpcs_return_their_results(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        assert await client.detokenize(await client.tokenize("h\u00e9")) == "h\u00e9"
        assert (await client.status()).state is State.ACTIVE
        assert await client.is_serving()
        assert 0 < await client.ping() < 5
        estimate = await client.estimate("org/name", context_length=64, prefix_cache_bytes=0)
        assert (estimate.context_length, estimate.fits) == (64, True)
        runner.prefix_cache_bytes = 100
        assert await client.trim(prefix_cache_bytes=70) == 30
        assert await client.trim() == 70
        assert await client.unload() == 0
        with pytest.raises(errors.ModelNotLoadedError):
            await client.tokenize("x")
        with pytest.raises(errors.ModelNotLoadedError):
            await client.embedding("x")


async def test_vectors_are_returned_in_the_order_of_the_texts(runner: FakeRunner) -> None:
    runner.embedding_dimension = 3
    async with AsyncRunnerClient(runner.address) as client:
        found = await client.embed(["a", [1, 2], "abc"], request_id="mine", priority=3)
        assert [each.token_count for each in found] == [1, 2, 3]
        assert await client.embedding("abc") == found[2]
        assert math.hypot(*found[2].values) == pytest.approx(1, abs=1e-6)
        capabilities = (await client.status()).model.capabilities  # type: ignore[union-attr]
        assert capabilities.embedding_dimension == len(found[0].values) == 3
    first, second = runner.requests
    assert isinstance(first, pb.EmbedRequest)
    assert (first.request_id, first.priority, first.literal) == ("mine", 3, False)
    assert second == pb.EmbedRequest(inputs=[pb.EmbedInput(text="abc")])


async def test_load_reports_its_progress(runner: FakeRunner) -> None:
    runner.load_seconds = 1.0
    seen: list[Status] = []
    async with AsyncRunnerClient(runner.address) as client:
        result = await client.load(
            "org/name",
            context_length=64,
            prefix_cache_bytes=10**8,
            memory_override=True,
            allow_inexact=True,
            kv_bits=4,
            on_progress=seen.append,
        )
    assert (result.model.name, result.model.kv_bits) == ("org/name", 4)
    progress = [status.progress for status in seen if status.state is State.LOADING]
    assert len(progress) >= 2
    assert progress == sorted(progress)
    assert runner.requests == [
        pb.LoadRequest(
            model="org/name",
            context_length=64,
            dtype=pb.DTYPE_AUTO,
            prefix_cache_bytes=10**8,
            memory_override=True,
            allow_inexact=True,
            kv_bits=4,
        )
    ]


async def test_a_stalled_load_times_out_and_is_cancelled(runner: FakeRunner) -> None:
    runner.load_seconds = math.inf
    async with AsyncRunnerClient(runner.address, timeouts=Timeouts(load_seconds=0.5)) as client:
        with pytest.raises(errors.RunnerTimeoutError) as caught:
            await client.load("org/name")
        assert await wait_in_thread(runner.cancelled)
    assert caught.value.phase == "load"


async def test_cancelling_the_task_cancels_the_load(runner: FakeRunner) -> None:
    runner.load_seconds = math.inf
    async with AsyncRunnerClient(runner.address) as client:
        load = asyncio.create_task(client.load("org/name"))
        while (await client.status()).state is not State.LOADING:
            pass
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load
        assert await wait_in_thread(runner.cancelled)


async def test_a_failing_load_leaves_no_task_behind(runner: FakeRunner) -> None:
    runner.failure = Failure("MODEL_NOT_FOUND")
    async with AsyncRunnerClient(runner.address) as client:
        with pytest.raises(errors.ModelNotFoundError):
            await client.load("org/name")
        assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_calls_on_a_closed_client_raise(runner: FakeRunner) -> None:
    client = AsyncRunnerClient(runner.address)
    await client.close()
    await client.close()
    with pytest.raises(errors.RunnerUnavailableError, match="is closed"):
        await client.status()
    with pytest.raises(errors.RunnerUnavailableError, match="is closed"):
        client.completion("Hi")
    with pytest.raises(errors.RunnerUnavailableError, match="is closed"):
        await client.load("org/name")


async def test_close_ends_the_calls_of_other_tasks(runner: FakeRunner) -> None:
    runner.stall_after, runner.load_seconds = 1, math.inf
    client = AsyncRunnerClient(runner.address)
    stream = client.completion("Hi")
    await anext(stream)
    tasks = [
        asyncio.create_task(anext(stream)),
        asyncio.create_task(client.load("org/name")),
    ]
    while (await client.status()).state is not State.LOADING:
        pass
    await client.close()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(end) for end in ends] == [errors.RunnerUnavailableError] * 2
    assert all("is closed" in str(end) for end in ends)


async def test_many_tasks_share_a_client(runner: FakeRunner) -> None:
    async with AsyncRunnerClient(runner.address) as client:
        completions = await asyncio.gather(*(client.complete("Hi") for _ in range(50)))
    assert {completion.content for completion in completions} == {"Hello world"}


def test_a_client_can_be_created_outside_an_event_loop(runner: FakeRunner) -> None:
    client = AsyncRunnerClient(runner.address)

    async def use() -> str:
        async with client:
            return (await client.complete("Hi")).content

    assert asyncio.run(use()) == "Hello world"
