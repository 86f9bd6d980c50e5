"""Characters and stop strings through the whole server."""

from __future__ import annotations

import pytest

from mlxrunner.v1 import runner_pb2 as pb
from support.fakes import EOS, says
from support.harness import Server, joined, tokens

TEXTS = [
    "emoji 😀🎉, family 👨‍👩‍👧‍👦 and 👩‍🔬",
    "日本語のテキスト、中文、한국어",
    "combining e\u0301 o\u0308\u0332, bidi עברית",
    "\U0010ffff\u0000\u200b",
]


@pytest.mark.parametrize("text", TEXTS)
async def test_every_message_has_whole_characters(loaded: Server, text: str) -> None:
    loaded.backend.reply = says(text)
    messages = await loaded.complete()
    assert joined(messages) == text
    assert tokens(messages) == [*text.encode(), EOS]
    assert not any("\ufffd" in message.content for message in messages)


async def test_a_character_cut_off_by_the_limit_is_one_replacement(loaded: Server) -> None:
    loaded.backend.reply = says("a😀")
    assert await loaded.text(num_predict=3) == "a\ufffd"


async def test_invalid_bytes_are_replaced(loaded: Server) -> None:
    loaded.backend.reply = says(b"a\xff\xfeb\xf0\x9fc")
    assert await loaded.text() == b"a\xff\xfeb\xf0\x9fc".decode(errors="replace")


async def test_text_ends_before_the_stop_string(loaded: Server) -> None:
    loaded.backend.reply = says("one two\nUser: three")
    messages = await loaded.complete(stop=["\nUser:"])
    assert joined(messages) == "one two"
    last = messages[-1]
    assert (last.done_reason, last.stop_match) == (pb.DONE_REASON_STOP, "\nUser:")
    # The tokens up to the one that completed the stop string are generated and reported.
    assert last.eval_count == len(tokens(messages)) == len("one two\nUser:")


async def test_the_row_ends_with_the_stop_string(loaded: Server) -> None:
    loaded.backend.reply = says("abcSTOP" + "x" * 500)
    await loaded.complete(stop=["STOP"])
    await loaded.settled()
    # One step for the prompt, seven for the tokens.
    assert loaded.backend.steps == 1 + len("abcSTOP")
    await loaded.assert_nothing_left()


@pytest.mark.parametrize(
    ("text", "stops", "shown", "match"),
    [
        ("abcd", ["cd", "bc"], "a", "bc"),
        ("aaab", ["aab"], "a", "aab"),
        ("ababac", ["abac"], "ab", "abac"),
        ("x日本y", ["日本"], "x", "日本"),
        ("x😀", ["😀"], "x", "😀"),
        ("stop", ["stop"], "", "stop"),
        ("a\n\nb", ["\n\n", "\n"], "a", "\n"),
    ],
)
async def test_the_first_of_several_overlapping_stops_counts(
    loaded: Server, text: str, stops: list[str], shown: str, match: str
) -> None:
    loaded.backend.reply = says(text)
    messages = await loaded.complete(stop=stops)
    assert (joined(messages), messages[-1].stop_match) == (shown, match)


async def test_a_partial_stop_is_shown_at_the_end(loaded: Server) -> None:
    loaded.backend.reply = says("the ST")
    messages = await loaded.complete(stop=["STOP"])
    assert (joined(messages), messages[-1].stop_match) == ("the ST", "")
    assert messages[-1].done_reason == pb.DONE_REASON_STOP


async def test_a_partial_stop_is_shown_at_the_limit(loaded: Server) -> None:
    loaded.backend.reply = says("the STOP")
    messages = await loaded.complete(stop=["STOP"], num_predict=6)
    assert joined(messages) == "the ST"
    assert messages[-1].done_reason == pb.DONE_REASON_LENGTH


async def test_a_stop_in_the_very_last_token_counts(loaded: Server) -> None:
    loaded.backend.reply = says("the STOP")
    messages = await loaded.complete(stop=["STOP"], num_predict=8)
    assert (joined(messages), messages[-1].stop_match) == ("the ", "STOP")
    assert messages[-1].done_reason == pb.DONE_REASON_STOP


async def test_a_stop_does_not_match_in_the_prompt(loaded: Server) -> None:
    loaded.backend.reply = says("P tail")
    assert await loaded.text("say STO", stop=["STOP"]) == "P tail"


async def test_a_partial_stop_is_not_sent_early(loaded: Server) -> None:
    loaded.backend.reply = says("abSTxx")
    loaded.backend.step_gate.shut()
    call = aiter(loaded.start(stop=["STOP"]))
    shown = ""
    # The prefill, whose message comes with the first token.
    loaded.backend.step_gate.allow()
    for expected in ("a", "ab", "ab", "ab", "abSTx"):
        loaded.backend.step_gate.allow()
        message = await anext(call)
        shown += message.content
        assert shown == expected
    loaded.backend.step_gate.open()
    rest = [message async for message in call]
    assert shown + joined(rest) == "abSTxx"
