"""Texts and bytes of log probabilities, joined, are the content."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlxrunner.v1 import runner_pb2 as pb
from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.output.text import REPLACEMENT, StreamDecoder
from runner_server.engine.output.token_text import TokenTexts
from runner_server.engine.types import Sampling
from support.fakes import BOS, EOS, ByteCodec, says
from support.harness import Server, joined

HARD = ["plain", "naïve café", "日本語 😀🎉", "e\u0301 שלום", "\ufffd\ufffd x"]


def _entries(messages: list[pb.CompletionResponse]) -> list[pb.TokenLogprob]:
    return [entry for message in messages for entry in message.logprobs]


def _texts(entries: list[pb.TokenLogprob]) -> tuple[str, bytes]:
    return "".join(e.text for e in entries), b"".join(e.bytes for e in entries)


@pytest.mark.parametrize("text", HARD)
async def test_joined_texts_are_the_content(loaded: Server, text: str) -> None:
    """Use the fake tokenizer, where a token is a byte, mostly a part of a character."""
    loaded.backend.reply = says(text)
    messages = await loaded.complete(logprobs=0)
    entries = _entries(messages)
    assert joined(messages) == text
    assert _texts(entries) == (text, text.encode())
    assert [entry.bytes for entry in entries[:-1]] == [bytes([byte]) for byte in text.encode()]
    # The token that ends the text is reported and adds nothing.
    assert (entries[-1].token_id, entries[-1].text, entries[-1].bytes) == (EOS, "", b"")


@pytest.mark.parametrize("data", [b"a\xffb", b"\xf0\x9f", b"x\xe6\x97", b"\xe6a\xe6\x97\xa5\x80"])
async def test_invalid_bytes_are_reported_unchanged(loaded: Server, data: bytes) -> None:
    loaded.backend.reply = says(data)
    messages = await loaded.complete(logprobs=0)
    assert joined(messages) == data.decode(errors="replace")
    assert _texts(_entries(messages)) == (joined(messages), data)


async def test_requested_tokens_come_with_their_texts(loaded: Server) -> None:
    """The fake's log probability of a requested token is a quarter of its id."""
    loaded.backend.reply = says("ab")
    messages = await loaded.complete(logprob_token_ids=[ord("z"), EOS, ord("a")], logprobs=1)
    for entry in _entries(messages):
        assert len(entry.top) == 1
        shown = [(each.text, each.bytes, each.logprob) for each in entry.candidates]
        assert shown == [
            ("z", b"z", -0.25 * ord("z")),
            ("", b"", -64),
            ("a", b"a", -0.25 * ord("a")),
        ]


async def test_a_text_may_end_within_a_character(loaded: Server) -> None:
    loaded.backend.reply = says("日")
    messages = await loaded.complete(logprobs=1, num_predict=2)
    assert joined(messages) == "\ufffd"
    assert [(e.text, e.bytes) for e in _entries(messages)] == [("", b"\xe6"), ("\ufffd", b"\x97")]


async def test_the_entries_include_the_stop_string(loaded: Server) -> None:
    loaded.backend.reply = says("one, two. three")
    messages = await loaded.complete(logprobs=0, stop=["two."])
    assert joined(messages) == "one, "
    assert _texts(_entries(messages)) == ("one, two.", b"one, two.")


async def test_a_prompt_may_end_within_a_character(loaded: Server) -> None:
    """Give the whole character as text, and its last byte as the token's bytes."""
    data = "😀".encode()
    loaded.backend.reply = says(data[3:] + "é".encode())
    request = pb.CompletionRequest(prompt_token_ids=pb.TokenIds(ids=[BOS, *data[:3]]), logprobs=1)
    messages = [message async for message in loaded.stub.Completion(request)]
    assert joined(messages) == "😀é"
    reported = [(entry.text, entry.bytes) for entry in _entries(messages)]
    assert reported == [("😀", data[3:]), ("", b"\xc3"), ("é", b"\xa9"), ("", b"")]


TOP = (*b"a\x80\xe6\x97", EOS, 300)


def _read(prompt: bytes, text: bytes) -> list[list[str]]:
    """Return the texts of the alternatives at each position."""
    codec, ids = ByteCodec(), list(prompt)
    texts, decoder = TokenTexts(codec, ids, frozenset({EOS})), StreamDecoder(codec.decode, ids)
    top = tuple((id_, -1.0) for id_ in TOP)
    read = [texts.read(TokenLogprob(byte, -1.0, top, decoder.push(byte))) for byte in text]
    return [[reported.text for reported in others] for _, others in read]


def test_alternatives_have_the_text_they_would_add() -> None:
    first, second, third, fourth = _read(b"x", "日b".encode())
    assert first == ["a", "\ufffd", "", "\ufffd", "", ""]
    # After the first byte of a character; an end token adds nothing.
    assert second == ["\ufffda", "", "\ufffd", "", "", ""]
    assert third == ["\ufffda", "旀", "\ufffd", "旗", "", ""]
    assert fourth == first


def test_alternatives_complete_a_character_of_the_prompt() -> None:
    ((*reported,),) = _read("x日".encode()[:-1], b"\xa5")
    assert reported[1] == "旀"


@given(text=st.text(max_size=20).map(str.encode), data=st.binary(max_size=6))
@example(text="日".encode(), data=b"\xf0\x9f")
def test_an_alternative_has_the_text_the_stream_would_show(text: bytes, data: bytes) -> None:
    """Compare each id at each position with the decoder of the content."""
    codec, ids = ByteCodec(), [*text, *data]
    texts, decoder = TokenTexts(codec, [120], frozenset()), StreamDecoder(codec.decode, [120])
    for index, id_ in enumerate(ids):
        top = tuple((other, -1.0) for other in {0, 97, 0x80, 0xA5, 0xE6, 0xF0, 0xFF} - {id_})
        _, others = texts.read(TokenLogprob(id_, -1.0, top, decoder.push(id_)))
        for (other, _), reported in zip(top, others, strict=True):
            instead = StreamDecoder(codec.decode, [120])
            for before in ids[:index]:
                instead.push(before)
            # The decoder may hold U+FFFD back, in case it becomes a character.
            assert reported.text.rstrip(REPLACEMENT) == instead.push(other).rstrip(REPLACEMENT)


class Spelled:
    """Tokenizer whose decoder looks at neighbours: words joined by spaces, except before dots."""

    words: Sequence[str] = ("<s>", "one", "two", ".")

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Codec.decode``."""
        return " ".join(self.words[id_] for id_ in ids).replace(" .", ".")

    def token_bytes(self, _id: int) -> None:
        """See ``Codec.token_bytes``: not known."""
        return


def test_bytes_that_depend_on_neighbours_come_from_the_text() -> None:
    codec = Spelled()
    texts, decoder = TokenTexts(codec, [0], frozenset()), StreamDecoder(codec.decode, [0])
    top = tuple((id_, -1.0) for id_ in range(1, 4))
    reported = [texts.read(TokenLogprob(id_, -1.0, top, decoder.push(id_))) for id_ in [1, 2, 3, 1]]
    assert b"".join(own.data for own, _ in reported) == b" one two. one"
    for own, others in reported:
        assert own.data == own.text.encode()
        assert [other.text for other in others] == [" one", " two", "."]
        assert [other.data for other in others] == [b" one", b" two", b"."]


async def test_a_token_has_the_same_text_as_an_alternative(loaded: Server) -> None:
    def reply(_ids: Sequence[int], _sampling: Sampling) -> Iterator[int]:
        return iter([0xE6, 0, 1, EOS])

    loaded.backend.reply = reply
    messages = await loaded.complete(logprobs=2)
    held, first, second, _ = _entries(messages)
    assert (held.text, first.text, second.text) == ("", "\ufffd\0", "\1")
    assert (first.top[0].text, first.top[0].bytes) == (first.text, first.bytes)
    assert [top.text for top in second.top] == ["\0", "\1"]


async def test_merged_deltas_keep_their_order(loaded: Server) -> None:
    """Merge many tokens into one message for a slow reader; the entries keep their order."""
    text = "日本語😀" * 100
    loaded.backend.reply = says(text)
    call = loaded.start(logprobs=3)
    await loaded.settled()
    messages = [message async for message in call]
    assert _texts(_entries(messages)) == (text, text.encode())
