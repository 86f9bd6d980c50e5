"""Log probabilities of the prompt: their texts, their messages, and their bounds."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.logprobs import PromptLogprobs
from runner_server.engine.output.prompt_text import PromptTexts
from support.fakes import BOS, ByteCodec
from support.harness import Server, joined

TEXTS = ["x", "plain", "naïve 日本語 😀", "e\u0301 \ufffd"]


def _entries(messages: list[pb.CompletionResponse]) -> list[pb.TokenLogprob]:
    return [entry for message in messages for entry in message.prompt_logprobs]


def _part(ids: bytes, width: int) -> PromptLogprobs:
    count = len(ids)
    return PromptLogprobs(
        array("i", [*ids]),
        array("f", [-1.0] * count),
        array("i", range(width * count)),
        array("f", [-float(i) for i in range(width * count)]),
    )


@pytest.mark.parametrize("text", TEXTS)
async def test_every_token_but_the_first_has_an_entry(loaded: Server, text: str) -> None:
    """The fake's tokens are bytes, with log probabilities of minus an eighth of their values."""
    messages = await loaded.complete(text, prompt_logprobs=2, num_predict=3)
    entries = _entries(messages)
    assert [entry.token_id for entry in entries] == [*text.encode()]
    assert [entry.logprob for entry in entries] == [-byte / 8 for byte in text.encode()]
    assert "".join(entry.text for entry in entries) == text
    assert b"".join(entry.bytes for entry in entries) == text.encode()
    assert all([top.token_id for top in entry.top] == [0, 1] for entry in entries)
    assert messages[-1].eval_count == 3
    assert len(joined(messages)) == 3


async def test_no_entries_come_unless_they_are_requested(loaded: Server) -> None:
    assert not _entries(await loaded.complete("plain", logprobs=1, num_predict=1))


async def test_log_probabilities_of_prompt_and_output_come_apart(loaded: Server) -> None:
    messages = await loaded.complete("ab", prompt_logprobs=0, logprobs=1, num_predict=2)
    assert [len(entry.top) for entry in _entries(messages)] == [0, 0]
    generated = [entry for message in messages for entry in message.logprobs]
    assert [len(entry.top) for entry in generated] == [1, 1]


async def test_a_prompt_of_one_token_has_no_entries(loaded: Server) -> None:
    ids = pb.TokenIds(ids=[BOS])
    options = pb.CompletionOptions(num_predict=1)
    request = pb.CompletionRequest(prompt_token_ids=ids, options=options, prompt_logprobs=1)
    messages = [message async for message in loaded.stub.Completion(request)]
    assert not _entries(messages)
    assert messages[-1].eval_count == 1


async def test_an_end_token_in_a_prompt_is_a_token_like_any_other(loaded: Server) -> None:
    messages = await loaded.complete(
        "abc", prompt_logprobs=1, stop_token_ids=[ord("b")], num_predict=1
    )
    assert [entry.text for entry in _entries(messages)] == ["a", "b", "c"]


async def test_no_entry_comes_after_the_first_token(loaded: Server) -> None:
    messages = await loaded.complete("x" * 100, prompt_logprobs=1, num_predict=30)
    first = next(i for i, message in enumerate(messages) if message.token_ids)
    assert not any(message.prompt_logprobs for message in messages[first + 1 :])


async def test_no_message_exceeds_the_clients_limit(server: Server) -> None:
    """Stay below a default client's limit, which the channel has, for a reader that waits."""
    await server.load(context_length=4096)
    call = server.start("日" * 1300, prompt_logprobs=20, num_predict=1)
    await server.settled()
    messages = [message async for message in call]
    assert "".join(entry.text for entry in _entries(messages)) == "日" * 1300
    assert max(message.ByteSize() for message in messages) < 2**20
    assert len(messages) > 10


@given(data=st.binary(min_size=1, max_size=60), size=st.integers(1, 9))
def test_joined_texts_are_the_text_of_the_prompt_whatever_the_parts(data: bytes, size: int) -> None:
    texts = PromptTexts(ByteCodec(), [BOS, *data])
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    read = [entry for part in parts for entry in texts.read(_part(part, 1))]
    assert "".join(entry.text for entry, _, _ in read) == data.decode(errors="replace")
    assert b"".join(own.data for _, own, _ in read) == data


@pytest.mark.parametrize("width", [0, 1, 3])
@pytest.mark.parametrize("most", [1, 2, 5, 9])
def test_parts_have_the_entries_of_the_whole(width: int, most: int) -> None:
    whole = _part(b"abcdefg", width)
    parts = list(whole.parts(most))
    assert max(len(part.token_ids) for part in parts) <= most
    assert all(part.width == width for part in parts)
    entries = [entry for part in parts for entry in part.entries()]
    assert entries == list(whole.entries())
    assert [entry.token_id for entry in entries] == [*b"abcdefg"]
    tops = [id_ for entry in entries for id_, _ in entry.top]
    assert tops == list(range(7 * width))
