"""Tokens that end a text: those of the request and those of the model."""

from __future__ import annotations

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import EOS, says
from support.harness import Server, joined, tokens

B = ord("b")


@pytest.mark.parametrize("stop_token_ids", [[ord("d")], [300, ord("d"), ord("f")]])
async def test_a_stop_token_ends_the_text_and_is_not_in_it(
    loaded: Server, stop_token_ids: list[int]
) -> None:
    loaded.backend.reply = says("abcdef")
    messages = await loaded.complete(stop_token_ids=stop_token_ids, logprobs=0)
    assert joined(messages) == "abc"
    assert tokens(messages) == [*b"abcd"]
    last = messages[-1]
    assert (last.done_reason, last.stop_match) == (pb.DONE_REASON_STOP, "")
    assert last.eval_count == 4
    entries = [entry for message in messages for entry in message.logprobs]
    assert [(entry.text, entry.bytes) for entry in entries[-2:]] == [("c", b"c"), ("", b"")]
    await loaded.assert_nothing_left()


async def test_a_stop_token_alternative_has_no_text(loaded: Server) -> None:
    """The alternatives of the fake are the tokens 0, 1 and so on."""
    messages = await loaded.complete(stop_token_ids=[1], logprobs=3, num_predict=1)
    assert [top.bytes for top in messages[-1].logprobs[0].top] == [b"\0", b"", b"\2"]


async def test_the_model_s_own_end_token_still_ends_the_text(loaded: Server) -> None:
    loaded.backend.reply = says("ab")
    messages = await loaded.complete(stop_token_ids=[300])
    assert tokens(messages) == [*b"ab", EOS]


async def test_a_stop_token_flushes_an_unfinished_character(loaded: Server) -> None:
    loaded.backend.reply = says(b"a\xf0\x9fb")
    assert await loaded.text(stop_token_ids=[B]) == "a\ufffd"


async def test_a_stop_token_shows_the_text_held_back_for_a_stop_string(loaded: Server) -> None:
    loaded.backend.reply = says("xENb")
    messages = await loaded.complete(stop=["END"], stop_token_ids=[B])
    assert joined(messages) == "xEN"
    assert messages[-1].stop_match == ""


async def test_the_last_allowed_token_may_be_a_stop_token(loaded: Server) -> None:
    loaded.backend.reply = says("ab")
    last = (await loaded.complete(stop_token_ids=[B], num_predict=2))[-1]
    assert (last.done_reason, last.eval_count) == (pb.DONE_REASON_STOP, 2)


def _twice(text: bytes) -> list[int]:
    """Return the tokens of a text with two end tokens in it."""
    return [*text[:1], EOS, *text[1:], EOS]


async def test_ignored_end_tokens_do_not_end_the_text(loaded: Server) -> None:
    loaded.backend.reply = lambda _ids, _sampling: iter(_twice(b"abc"))
    messages = await loaded.complete(ignore_eos=True, num_predict=5)
    assert tokens(messages) == _twice(b"abc")
    assert messages[-1].done_reason == pb.DONE_REASON_LENGTH


async def test_an_ignored_end_token_in_the_stop_tokens_ends_the_text(loaded: Server) -> None:
    loaded.backend.reply = lambda _ids, _sampling: iter(_twice(b"abc"))
    messages = await loaded.complete(ignore_eos=True, stop_token_ids=[EOS])
    assert (tokens(messages), joined(messages)) == ([*b"a", EOS], "a")
    assert messages[-1].done_reason == pb.DONE_REASON_STOP


async def test_a_stop_string_still_ends_a_text_that_ignores_end_tokens(loaded: Server) -> None:
    loaded.backend.reply = lambda _ids, _sampling: iter(_twice(b"abcd"))
    messages = await loaded.complete(ignore_eos=True, stop=["c"])
    assert (joined(messages), messages[-1].stop_match) == ("ab", "c")


@pytest.mark.parametrize(
    ("least", "shown", "count"),
    [
        (0, "", 1),
        (1, "a", 3),
        (3, "abax", 6),
        # "ba" begins in the text of the first five tokens.
        (5, "abaxb", 6),
        (6, "abaxbay", 7),
    ],
)
async def test_stop_strings_are_looked_for_after_the_first_tokens(
    loaded: Server, least: int, shown: str, count: int
) -> None:
    loaded.backend.reply = says("abaxbay")
    messages = await loaded.complete(stop=["a", "ba"], min_predict=least, num_predict=7)
    assert (joined(messages), messages[-1].eval_count) == (shown, count)


async def test_the_end_of_the_context_ends_the_text_before_the_minimum(server: Server) -> None:
    await server.load(context_length=16)
    last = (await server.complete("x" * 9, min_predict=100))[-1]
    assert (last.eval_count, last.done_reason) == (6, pb.DONE_REASON_LENGTH)
