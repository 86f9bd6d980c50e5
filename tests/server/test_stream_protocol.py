"""Rules for every stream of a completion."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.types import Sampling
from support.fakes import EOS, PREFILL_CHUNK, says
from support.harness import CompletionCall, Server, joined, tokens


@pytest.mark.parametrize("num_predict", [1, 2, 7, 300])
async def test_exactly_the_last_message_is_done(loaded: Server, num_predict: int) -> None:
    messages = await loaded.complete(num_predict=num_predict)
    assert [message.done for message in messages] == [False] * (len(messages) - 1) + [True]
    assert messages[-1].eval_count == len(tokens(messages)) == num_predict
    assert messages[-1].done_reason == pb.DONE_REASON_LENGTH


async def test_only_the_last_message_has_counts(loaded: Server) -> None:
    messages = await loaded.complete("hello", num_predict=5)
    for message in messages[:-1]:
        assert message.done_reason == pb.DONE_REASON_UNSPECIFIED
        assert not message.HasField("prompt_eval_duration")
        assert not message.prompt_eval_count
    last = messages[-1]
    assert last.prompt_eval_count == len("hello") + 1
    assert not last.HasField("prompt_progress")
    for name in ("prompt_eval_duration", "eval_duration", "queue_duration"):
        assert last.HasField(name)
        assert getattr(last, name).ToNanoseconds() >= 0


async def test_content_is_the_text_without_the_end_token(loaded: Server) -> None:
    loaded.backend.reply = says("The quick brown fox.")
    messages = await loaded.complete()
    assert joined(messages) == "The quick brown fox."
    assert tokens(messages) == [*b"The quick brown fox.", EOS]
    assert messages[-1].eval_count == len("The quick brown fox.") + 1
    assert messages[-1].done_reason == pb.DONE_REASON_STOP
    assert messages[-1].stop_match == ""


async def test_an_empty_answer_is_one_token(loaded: Server) -> None:
    loaded.backend.reply = says("")
    messages = await loaded.complete()
    assert (joined(messages), tokens(messages)) == ("", [EOS])
    assert messages[-1].done_reason == pb.DONE_REASON_STOP


async def test_a_long_prompt_reports_progress(loaded: Server) -> None:
    prompt = "x" * (5 * PREFILL_CHUNK + 3)
    loaded.backend.step_gate.shut()
    call = loaded.start(prompt, num_predict=1)
    seen = []
    async for message in _one_step_each(loaded, call):
        if message.HasField("prompt_progress"):
            assert not message.token_ids
            assert not message.content
            seen.append(message.prompt_progress)
            if len(seen) == 5:
                # The last chunk, whose message waits for the first token.
                loaded.backend.step_gate.allow()
    total = len(prompt) + 1
    # The last two chunks share the rest evenly; the end of the last one comes with the first token.
    assert [entry.evaluated_count for entry in seen] == [8, 16, 24, 32, 38]
    assert {entry.total_count for entry in seen} == {total}


async def test_the_end_of_the_context_ends_a_text(server: Server) -> None:
    await server.load(context_length=32)
    messages = await server.complete("hello", num_predict=10_000)
    assert messages[-1].prompt_eval_count + messages[-1].eval_count == 32
    assert messages[-1].done_reason == pb.DONE_REASON_LENGTH


async def test_a_prompt_one_token_short_of_the_context_gets_one_token(server: Server) -> None:
    await server.load(context_length=6)
    messages = await server.complete("hello"[:4])
    assert messages[-1].eval_count == 1


async def test_token_ids_are_used_as_they_are(loaded: Server) -> None:
    seen: list[list[int]] = []

    def reply(ids: Sequence[int], _sampling: Sampling) -> Iterator[int]:
        seen.append(list(ids))
        return iter([EOS])

    loaded.backend.reply = reply
    ids = pb.TokenIds(ids=[1, 2, 3])
    call = loaded.stub.Completion(pb.CompletionRequest(prompt_token_ids=ids))
    messages = [message async for message in call]
    assert seen == [[1, 2, 3]]
    assert messages[-1].prompt_eval_count == 3


async def test_there_is_one_logprob_for_each_token(loaded: Server) -> None:
    messages = await loaded.complete(num_predict=50, logprobs=2)
    entries = [entry for message in messages for entry in message.logprobs]
    assert [entry.token_id for entry in entries] == tokens(messages)
    for message in messages:
        assert len(message.logprobs) == len(message.token_ids)
    for entry in entries:
        assert entry.text == chr(entry.token_id)
        assert entry.logprob == -0.5
        assert [top.token_id for top in entry.top] == [0, 1]


async def test_logprobs_of_zero_have_no_alternatives(loaded: Server) -> None:
    messages = await loaded.complete(num_predict=3, logprobs=0)
    entries = [entry for message in messages for entry in message.logprobs]
    assert len(entries) == 3
    assert not any(entry.top for entry in entries)


async def test_logprobs_are_off_by_default(loaded: Server) -> None:
    messages = await loaded.complete(num_predict=3)
    assert not any(message.logprobs for message in messages)


async def test_a_seed_gives_the_same_text_alone_and_beside_others(loaded: Server) -> None:
    alone = await loaded.text("abc", seed=7, num_predict=40)
    calls = [loaded.start("abc", seed=seed, num_predict=40) for seed in (7, 8, 9)]
    texts = ["".join([message.content async for message in call]) for call in calls]
    assert texts[0] == alone
    assert len(set(texts)) == 3


async def test_without_a_seed_texts_differ(loaded: Server) -> None:
    assert len({await loaded.text(num_predict=40) for _ in range(3)}) == 3


async def _one_step_each(
    server: Server, call: CompletionCall
) -> AsyncIterator[pb.CompletionResponse]:
    """Let the engine make one step after each message."""
    server.backend.step_gate.allow()
    async for message in call:
        yield message
        server.backend.step_gate.allow()
