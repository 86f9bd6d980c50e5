"""A slow reader gets fewer and larger messages and costs other requests no time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import grpc
import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_common.serving.log import set_up_logging
from runner_server.api.convert import delta_message
from runner_server.engine.generation_request import GenerationRequest
from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.output.channel import _MAX_QUEUED_TEXTS, OutputChannel, merge
from runner_server.engine.output.token_text import TokenTexts
from runner_server.engine.output.wakeups import WakeupCoalescer
from runner_server.engine.request import RequestStatus
from runner_server.engine.types import FinishReason, GenerationResult, OutputDelta
from runner_server.errors import ShuttingDown
from support.fakes import ByteCodec, says
from support.harness import (
    LIMITS,
    CompletionCall,
    Server,
    count_calls,
    count_rounds,
    eventually,
    failure,
    joined,
    tokens,
)

UNLOAD = pb.UnloadRequest()
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16 << 10)]
"""Options of a client that buffers little ahead of its reader; others buffer megabytes."""

DONE = GenerationResult(FinishReason.STOP, "", 1, 2, 0.0, 0.0, 0.0)


async def test_waiting_deltas_become_one_message() -> None:
    stream = OutputChannel()
    stream.put(OutputDelta(prefill=(3, 9)))
    stream.put(OutputDelta(prefill=(9, 9)))
    for i in range(3):
        stream.put(OutputDelta(str(i), (i,), (TokenLogprob(i, -1.0, ()),)))
    stream.put(OutputDelta("e", (9,), done=DONE))
    stream.wake()
    pieces = [piece async for piece in stream.deltas()]
    assert len(pieces) == 1
    assert (pieces[0].text, pieces[0].token_ids, pieces[0].done) == ("012e", (0, 1, 2, 9), DONE)
    assert [entry.token_id for entry in pieces[0].logprobs] == [0, 1, 2]
    assert pieces[0].prefill is None


async def test_only_the_newest_progress_counts() -> None:
    assert merge([OutputDelta(prefill=(3, 9)), OutputDelta(prefill=(6, 9))]).prefill == (6, 9)


async def test_output_before_a_failure_is_delivered_first() -> None:
    stream = OutputChannel()
    stream.put(OutputDelta("a", (1,)))
    stream.fail(ShuttingDown("gone"))
    stream.wake()
    pieces = stream.deltas()
    assert (await anext(pieces)).text == "a"
    with pytest.raises(ShuttingDown, match="gone"):
        await anext(pieces)


async def test_the_first_failure_stays() -> None:
    stream = OutputChannel()
    stream.fail(ShuttingDown("rank 1 is gone"))
    stream.fail(ShuttingDown("stopping"))
    stream.wake()
    with pytest.raises(ShuttingDown, match="rank 1"):
        await anext(stream.deltas())


async def test_a_sleeping_reader_costs_other_requests_no_time(server: Server) -> None:
    await server.load(parallel=2)
    slow = server.start("slow", num_predict=3000, logprobs=20)
    messages = aiter(slow)
    await anext(messages)
    # The other request runs from start to end while the first one has no reader.
    assert len(tokens(await server.complete("quick", num_predict=2000))) == 2000
    await server.settled()
    rest = [message async for message in messages]
    assert rest[-1].eval_count == 3000
    assert len(rest) < 1500


async def test_no_message_exceeds_the_clients_limit(server: Server) -> None:
    """Stay below a default client's limit, which the channel has."""
    await server.load(context_length=4096)
    server.backend.reply = says("日" * 1300)
    call = server.start("x", logprobs=20)
    await server.settled()
    messages = [message async for message in call]
    assert joined(messages) == "日" * 1300
    assert max(message.ByteSize() for message in messages) < 2 * 2**20


async def test_long_token_texts_with_logprobs_stay_under_the_limit() -> None:
    """Use tokens of some hundred bytes, as in real vocabularies, with 20 alternatives each."""

    class Long(ByteCodec):
        def token_bytes(self, _token_id: int) -> bytes:
            return b" " * 512

    stream, texts = OutputChannel(), TokenTexts(Long(), (), frozenset())
    entry = TokenLogprob(1, -1.0, tuple((100_000 + i, -2.0) for i in range(20)), " " * 512)
    for _ in range(2047):
        stream.put(OutputDelta(" " * 512, (1,), (entry,)))
    stream.put(OutputDelta("", (2,), (entry,), done=DONE))
    stream.wake()
    sizes = [delta_message(piece, texts).ByteSize() async for piece in stream.deltas()]
    assert max(sizes) < 4 * 2**20


async def test_the_event_loop_is_woken_at_most_once_per_step(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.load(parallel=8)
    wakes = count_calls(monkeypatch, WakeupCoalescer, "_on_notified")
    calls = [server.start(str(i), num_predict=20) for i in range(8)]
    for call in calls:
        assert [message async for message in call][-1].eval_count == 20
    assert 0 < wakes() <= server.backend.steps


async def test_only_readers_of_first_or_last_output_are_woken_at_once() -> None:
    publisher = WakeupCoalescer(asyncio.get_running_loop())
    publisher._last_wakeup = asyncio.get_running_loop().time() + 3600
    running, first = OutputChannel(), OutputChannel()
    publisher.publish([running])
    publisher.publish([running, first], [first])
    await asyncio.sleep(0)
    assert first._ready.is_set()
    assert not running._ready.is_set()
    publisher.publish([], [running])
    await asyncio.sleep(0)
    assert running._ready.is_set()


async def test_a_done_message_is_never_merged_away(loaded: Server) -> None:
    loaded.backend.reply = says("ab")
    calls = [loaded.start() for _ in range(20)]
    for call in calls:
        messages = [message async for message in call]
        assert [message.done for message in messages].count(True) == 1
        assert messages[-1].done_reason == pb.DONE_REASON_STOP


# -- readers that stop ------------------------------------------------------------


@pytest.fixture
async def stopping_client(server: Server) -> AsyncIterator[Server]:
    """Another client of the same server, whose readers soon fall behind."""
    options = [*LIMITS, *SMALL_WINDOW]
    async with grpc.aio.insecure_channel(server.ready.target, options=options) as channel:
        yield Server(server.app, server.backend, channel, server.ready)


async def _start_stopped(client: Server, prompt: str = "slow", **options: Any) -> CompletionCall:
    """Start a completion, stop reading, and wait until the request stays preempted."""
    before = set(client.view.requests)
    call = client.start(prompt, logprobs=20, **{"num_predict": 1500, **options})
    await eventually(lambda: client.view.request_count > len(before))
    (request,) = set(client.view.requests) - before

    async def stands_still() -> bool:
        for _ in range(10):
            await client.status()
            if request.status is not RequestStatus.PREEMPTED:
                return False
            # The reader was woken, and has not taken the output.
            if not request.stream._ready.is_set():
                return False
        return True

    await eventually(stands_still)
    return call


def _preempted_count(server: Server) -> int:
    return len(server.view.preempted)


async def _run_together(server: Server, count: int, length: int) -> tuple[list[str], int]:
    """Run completions at once; return their texts and the number of steps."""
    backend = server.backend
    before, gate = backend.steps, backend.step_gate
    gate.shut()
    calls = [server.start(f"other {i}", num_predict=length, seed=i) for i in range(count)]
    await eventually(lambda: server.view.request_count == count + _preempted_count(server))
    await server.thread(gate.wait_arrival)
    gate.open()
    texts = await asyncio.gather(*(_read(call) for call in calls))
    return texts, backend.steps - before


async def _read(call: CompletionCall) -> str:
    return joined([message async for message in call])


async def test_a_stopped_reader_costs_seven_others_nothing(
    server: Server, stopping_client: Server
) -> None:
    await server.load(parallel=8)
    expected, steps = await _run_together(server, 7, 300)
    slow_text = await server.text("slow", logprobs=20, num_predict=1500, seed=5)
    call = await _start_stopped(stopping_client, seed=5)
    (completion,) = server.view.preempted
    held = completion.stream._queued_texts
    texts, steps_beside_it = await _run_together(server, 7, 300)
    assert texts == expected
    # The same rate: as many tokens in each step, in as many steps.
    assert steps_beside_it == steps
    # The stopped stream does not grow either: it exceeds the bound by one token with its twenty
    # alternatives, which count twice.
    assert completion.stream._queued_texts == held <= _MAX_QUEUED_TEXTS + 43
    messages = [message async for message in call]
    assert joined(messages) == slow_text
    assert messages[-1].eval_count == 1500
    assert len(tokens(messages)) == sum(len(message.logprobs) for message in messages) == 1500
    await server.settled()
    await server.assert_nothing_left()


async def test_a_request_can_be_preempted_repeatedly(
    server: Server, stopping_client: Server
) -> None:
    await server.load(parallel=2)
    call = await _start_stopped(stopping_client)
    times = server.backend.preemptions
    read = 0
    messages = aiter(call)
    while server.backend.preemptions < times + 3:
        read += len((await anext(messages)).token_ids)
        # The transport sends all it can, and the request is preempted again or goes on.
        await server.status()
    rest = [message async for message in messages]
    assert read + len(tokens(rest)) == rest[-1].eval_count == 1500


async def test_an_abort_frees_a_stopped_reader(server: Server, stopping_client: Server) -> None:
    """The stream is blocked by its reader, so the service cannot cancel the request."""
    await server.load(parallel=1)
    call = await _start_stopped(stopping_client, request_id="slow")
    answer = await server.stub.Abort(pb.AbortRequest(request_ids=["slow"]))
    assert answer.aborted_count == 1
    await server.settled()
    await server.assert_nothing_left()
    assert (await failure(call)).reason == "ABORTED"


async def test_a_preempted_requests_slot_serves_others(
    server: Server, stopping_client: Server
) -> None:
    await server.load(parallel=1)
    call = await _start_stopped(stopping_client)
    assert len(tokens(await server.complete("quick", num_predict=500))) == 500
    assert len(tokens(await server.complete("quick too", num_predict=500))) == 500
    assert _preempted_count(server) == 1
    status = await server.status()
    assert (status.running_count, status.queued_count) == (1, 0)
    assert len(await _read(call)) == 1500


async def test_a_resumable_request_goes_before_waiting_ones(
    server: Server, stopping_client: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.load(parallel=1)
    slow = await _start_stopped(stopping_client)
    gate = server.backend.step_gate
    gate.shut()
    first = server.start("first", num_predict=1000)
    await server.thread(gate.wait_arrival)
    waiting = server.start("waiting", num_predict=5)
    await eventually(lambda: server.view.request_count == 3)
    reading = asyncio.ensure_future(_read(slow))
    # The reader has caught up once the request is resumable; it then needs a slot.
    passed = gate._passed
    while not server.view.resumable:
        gate.allow()
        passed += 1
        await server.thread(partial(gate.wait_passed, passed))
        await server.thread(gate.wait_arrival)
    assert len(server.view.running) == 1
    order: list[str] = []
    names = {server.view.resumable[0]: "slow", server.view.waiting[0]: "waiting"}
    admit, resume = GenerationRequest.admit, GenerationRequest.resume

    def admitting(request: GenerationRequest) -> None:
        order.append(names[request])
        admit(request)

    def resuming(request: GenerationRequest) -> None:
        order.append(names[request])
        resume(request)

    monkeypatch.setattr(GenerationRequest, "admit", admitting)
    monkeypatch.setattr(GenerationRequest, "resume", resuming)
    gate.open()
    assert len(await _read(first)) == 1000
    assert len(await _read(waiting)) == 5
    assert len(await reading) == 1500
    assert order[0] == "slow"
    assert "waiting" in order


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_a_cancelled_preempted_request_leaves_nothing(
    server: Server, stopping_client: Server, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    set_up_logging("INFO", "text")
    await server.load(parallel=2)
    if how == "cancel":
        call = await _start_stopped(stopping_client)
        call.cancel()
    else:
        call = await _start_stopped(stopping_client, timeout=3)
    await server.settled()
    await eventually(lambda: not _preempted_count(server))
    assert await server.text("next", num_predict=3)
    await server.settled()
    await server.assert_nothing_left()
    assert "ExecuteBatchError" not in caplog.text


async def test_an_unload_ends_a_preempted_request(server: Server, stopping_client: Server) -> None:
    await server.load(parallel=2)
    call = await _start_stopped(stopping_client)
    await server.stub.Unload(UNLOAD)
    await server.assert_nothing_left()
    assert (await failure(call)).reason == "SHUTTING_DOWN"


async def test_a_failed_step_ends_a_preempted_request(
    server: Server, stopping_client: Server
) -> None:
    """Fail the preempted row with its batch, whose caches can no longer be trusted."""
    await server.load(parallel=2)
    call = await _start_stopped(stopping_client)
    server.backend.failures.append(RuntimeError())
    assert (await failure(server.start())).reason == "GENERATION_FAILED"
    assert (await failure(call)).reason == "GENERATION_FAILED"
    assert await server.text(num_predict=3)
    await server.assert_nothing_left()


async def test_the_engine_sleeps_while_all_requests_are_preempted(
    server: Server, stopping_client: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.load(parallel=2)
    calls = [await _start_stopped(stopping_client, f"slow {i}") for i in range(3)]
    rounds = count_rounds(monkeypatch)
    steps = server.backend.steps
    for _ in range(30):
        assert (await server.status()).running_count == 3
    assert rounds() <= 1
    assert server.backend.steps == steps
    assert len(await server.text("quick", num_predict=50)) == 50
    assert [len(text) for text in await asyncio.gather(*map(_read, calls))] == [1500] * 3


async def test_a_fast_readers_request_is_never_preempted(server: Server) -> None:
    """Generate three times the bound, read as it arrives."""
    await server.load(parallel=2, context_length=4 * _MAX_QUEUED_TEXTS)
    gate = server.backend.step_gate
    gate.shut()
    call = server.start("fast", num_predict=3 * _MAX_QUEUED_TEXTS)
    read = 0
    reading = asyncio.ensure_future(_read(call))
    while not reading.done():
        read += 200
        gate.allow(200)
        await server.thread(partial(gate.wait_passed, min(read, 3 * _MAX_QUEUED_TEXTS)))
        completions = server.view.running
        await eventually(lambda: all(c.stream._queued_texts < 300 for c in completions))  # noqa: B023 - awaited
    assert len(await reading) == 3 * _MAX_QUEUED_TEXTS
    assert server.backend.preemptions == 0
