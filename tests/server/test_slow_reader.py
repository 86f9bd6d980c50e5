"""A slow reader gets fewer and larger messages, and takes nobody else's time."""

from __future__ import annotations

import pytest

from fakes import says
from harness import Server, joined, tokens
from mlxrunner.v1 import runner_pb2 as pb
from runner_server.convert import piece_message
from runner_server.errors import ShuttingDown
from runner_server.messages import Done, DoneReason, Piece, TokenLogprob
from runner_server.stream import Publisher, Stream, merge

DONE = Done(DoneReason.STOP, "", 1, 2, 0.0, 0.0, 0.0)


async def test_waiting_pieces_become_one_message() -> None:
    stream = Stream()
    stream.put(Piece(prefill=(3, 9)))
    stream.put(Piece(prefill=(9, 9)))
    for i in range(3):
        stream.put(Piece(str(i), (i,), (TokenLogprob(i, -1.0, ()),)))
    stream.put(Piece("e", (9,), done=DONE))
    stream.wake()
    pieces = [piece async for piece in stream.pieces()]
    assert len(pieces) == 1
    assert (pieces[0].text, pieces[0].token_ids, pieces[0].done) == ("012e", (0, 1, 2, 9), DONE)
    assert [entry.token_id for entry in pieces[0].logprobs] == [0, 1, 2]
    assert pieces[0].prefill is None


async def test_only_the_newest_progress_counts() -> None:
    assert merge([Piece(prefill=(3, 9)), Piece(prefill=(6, 9))]).prefill == (6, 9)


async def test_what_came_before_a_failure_is_delivered_first() -> None:
    stream = Stream()
    stream.put(Piece("a", (1,)))
    stream.fail(ShuttingDown("gone"))
    stream.wake()
    pieces = stream.pieces()
    assert (await anext(pieces)).text == "a"
    with pytest.raises(ShuttingDown, match="gone"):
        await anext(pieces)


async def test_a_reader_that_sleeps_costs_nobody_else_time(server: Server) -> None:
    await server.load(parallel=2)
    slow = server.start("slow", num_predict=3000, logprobs=20)
    messages = aiter(slow)
    await anext(messages)
    # The other one runs from start to end while nobody reads the first.
    assert len(tokens(await server.complete("quick", num_predict=2000))) == 2000
    await server.settled()
    rest = [message async for message in messages]
    assert rest[-1].eval_count == 3000
    assert len(rest) < 1500


async def test_no_message_passes_four_mebibytes(server: Server) -> None:
    """The channel has a default client's limit, so a larger one would fail the call."""
    await server.load(context_length=4096)
    server.backend.reply = says("日" * 1300)
    call = server.start("x", logprobs=20)
    await server.settled()
    messages = [message async for message in call]
    assert joined(messages) == "日" * 1300
    assert max(message.ByteSize() for message in messages) < 2 * 2**20


async def test_long_token_texts_with_logprobs_stay_under_the_limit() -> None:
    """Vocabularies have tokens of some hundred bytes; 20 of them come with each token."""

    def decode(_ids: object) -> str:
        return " " * 512

    stream = Stream()
    entry = TokenLogprob(1, -1.0, tuple((100_000 + i, -2.0) for i in range(20)))
    for _ in range(2047):
        stream.put(Piece(" " * 512, (1,), (entry,)))
    stream.put(Piece("", (2,), (entry,), done=DONE))
    stream.wake()
    sizes = [piece_message(piece, decode).ByteSize() async for piece in stream.pieces()]
    assert max(sizes) < 4 * 2**20


async def test_the_loop_is_woken_at_most_once_a_step_for_all(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.load(parallel=8)
    wakes = 0
    wake = Publisher._wake

    def counting(publisher: Publisher) -> None:
        nonlocal wakes
        wakes += 1
        wake(publisher)

    monkeypatch.setattr(Publisher, "_wake", counting)
    calls = [server.start(str(i), num_predict=20) for i in range(8)]
    for call in calls:
        assert [message async for message in call][-1].eval_count == 20
    assert 0 < wakes <= server.backend.steps


async def test_a_done_message_is_never_merged_away(loaded: Server) -> None:
    loaded.backend.reply = says("ab")
    calls = [loaded.start() for _ in range(20)]
    for call in calls:
        messages = [message async for message in call]
        assert [message.done for message in messages].count(True) == 1
        assert messages[-1].done_reason == pb.DONE_REASON_STOP
