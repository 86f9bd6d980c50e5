"""Whole characters and stop strings, without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from runner_server.engine.output.text import REPLACEMENT, StopMatcher, StreamDecoder
from support.fakes import ByteCodec

pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")

import tokenizers

import support.tokenizer_files as tokenizer_files

Decode = Callable[[Sequence[int]], str]

HARD = [
    "plain",
    "naïve café",
    "日本語のテキスト",
    "😀🎉😀🎉😀🎉",
    "a👩‍🔬b👨‍👩‍👧‍👦c",
    "e\u0301o\u0308\u0332x",
    "עברית Ελληνικά",
    "\u200b\ufeff\U0010ffff",
    "mixed 日 and 😀, ß" * 12,
]


def _sentencepiece() -> Any:
    """Return a tokenizer like Llama 2's and Gemma's: pieces, with bytes as the fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "▁a", "日", "x", "c"]
    vocab = [(piece, 0.0 if i < 3 else -float(i)) for i, piece in enumerate(pieces)]
    model = tokenizers.models.Unigram(vocab, unk_id=0, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    parts = tokenizers.decoders
    tokenizer.decoder = parts.Sequence(
        [
            parts.Replace("▁", " "),
            parts.ByteFallback(),
            parts.Fuse(),
            parts.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _byte_level() -> Any:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer


SENTENCEPIECE = _sentencepiece()
BYTE_LEVEL = _byte_level()
TRAINED = {name: make() for name, make in tokenizer_files.KINDS.items()}

KINDS: dict[str, tuple[Decode, Callable[[bytes], list[int]]]] = {
    "bytes": (ByteCodec().decode, list),
    "byte_level": (
        lambda ids: str(BYTE_LEVEL.decode(list(ids), skip_special_tokens=False)),
        lambda data: [_byte_level_id(byte) for byte in data],
    ),
    "byte_fallback": (
        lambda ids: str(SENTENCEPIECE.decode(list(ids), skip_special_tokens=False)),
        lambda data: [3 + byte for byte in data],
    ),
}


def _byte_level_id(byte: int) -> int:
    """Return the id of one byte, which GPT-2's table maps to a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    char = chr(byte) if byte in printable else chr(256 + _unprintable(byte, printable))
    return int(BYTE_LEVEL.token_to_id(char))


def _unprintable(byte: int, printable: list[int]) -> int:
    return [b for b in range(256) if b not in printable].index(byte)


def _stream(decode: Decode, ids: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    decoder = StreamDecoder(decode, prompt)
    return [*(decoder.push(id_) for id_ in ids), decoder.flush()]


def _common(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", HARD)
def test_valid_text_arrives_whole(kind: str, text: str) -> None:
    decode, encode = KINDS[kind]
    pieces = _stream(decode, encode(text.encode()))
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=60), prompt=st.text(max_size=12))
@example(text="日本語", prompt="日😀🎉")
@example(text="😀" * 20, prompt="😀" * 12)
@example(text="\x00\x00日", prompt="\ufeff")
def test_any_text_after_any_prompt_arrives_whole(kind: str, text: str, prompt: str) -> None:
    decode, encode = KINDS[kind]
    # The decoder strips a space at the very beginning, which never belongs to the answer.
    prompt_ids = encode(b"x" + prompt.encode())
    pieces = _stream(decode, encode(text.encode()), prompt_ids)
    # The replacement character appears only if the text itself has it.
    assert "".join(pieces) == text


@pytest.mark.parametrize("kind", ["bytes", "byte_level"])
@given(data=st.binary(max_size=80))
@example(data=b"\xf0\x9f\x98\xf0\x9f\x98\x80\xe6\x97a\xff\xff\xff\xff\xffb")
def test_any_bytes_stream_as_the_decoder_decodes_them(kind: str, data: bytes) -> None:
    decode, encode = KINDS[kind]
    ids = encode(data)
    assert "".join(_stream(decode, ids)) == decode(ids)


@given(data=st.binary(max_size=60))
@example(data="日本語".encode() + b"\xffa")
@example(data=b"\xff" + "日本語".encode() * 9)
def test_byte_fallback_loses_no_characters(data: bytes) -> None:
    # A decoder with byte fallback turns a whole run of bytes into replacement characters as soon as
    # one of them is wrong, so the streamed text may be better than its final result.
    decode, encode = KINDS["byte_fallback"]
    ids = [*encode(data), SENTENCEPIECE.token_to_id("x")]
    shown = "".join(_stream(decode, ids))
    assert shown.endswith("x")
    assert len(decode(ids).replace(REPLACEMENT, "")) <= len(shown.replace(REPLACEMENT, ""))
    assert len(shown) <= len(decode(ids))


@given(ids=st.lists(st.integers(3, 265), max_size=60))
def test_a_sentencepiece_space_is_kept_between_words(ids: list[int]) -> None:
    words = [id_ for id_ in ids if id_ >= 259]
    decode = KINDS["byte_fallback"][0]
    prompt = [SENTENCEPIECE.token_to_id("a")]
    assert "".join(_stream(decode, words, prompt)) == decode(prompt + words)[1:]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", [0, 1, 3, 7, 8, 12, 40])
@pytest.mark.parametrize("char", ["é", "漢", "😀"])
def test_a_character_that_the_prompt_began_is_shown_once_and_whole(
    kind: str, before: int, char: str
) -> None:
    decode, encode = KINDS[kind]
    data = (f"Hi{char * before}" + f"{char * 4}!").encode()
    for cut in range(1, len(char.encode())):
        at = len(f"Hi{char * before}".encode()) + cut
        pieces = _stream(decode, encode(data[at:]), encode(data[:at]))
        assert "".join(pieces) == f"{char * 4}!"
        assert not any(REPLACEMENT in piece for piece in pieces)


TEXT = st.text("aé漢字😀🎉\u0301 \n", max_size=40) | st.text(max_size=40)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT.filter(lambda text: REPLACEMENT not in text), cut=st.integers(0, 200))
@example(text="😀" * 12, cut=41)
@example(text="漢ab漢", cut=7)
def test_a_prompt_may_end_within_a_character(kind: str, text: str, cut: int) -> None:
    decode, encode = KINDS[kind]
    # The decoder strips a space at the very beginning, which never belongs to the answer.
    data = b"x" + text.encode()
    at = min(cut + 1, len(data))
    whole = len(data[:at].decode(errors="ignore"))
    assert "".join(_stream(decode, encode(data[at:]), encode(data[:at]))) == f"x{text}"[whole:]


@pytest.mark.parametrize("kind", ["bytes", "byte_level"])
@given(data=st.binary(max_size=60), cut=st.integers(0, 60))
@example(data=b"\xf0\x9f\xff\xe6\xe6\xbc\xa2", cut=1)
@example(data=b"\xff" * 30 + "漢".encode(), cut=32)
def test_a_prompt_of_any_bytes_may_end_anywhere(kind: str, data: bytes, cut: int) -> None:
    decode, encode = KINDS[kind]
    prompt, ids = encode(data[:cut]), encode(data[cut:])
    whole = decode([*prompt, *ids])
    shown = "".join(_stream(decode, ids, prompt))
    assert shown == whole[_common(whole, decode(prompt)) :]


@given(data=st.binary(max_size=60), cut=st.integers(0, 60))
@example(data=b"\xff" + "漢".encode() * 9, cut=27)
def test_byte_fallback_loses_nothing_after_any_prompt(data: bytes, cut: int) -> None:
    decode, encode = KINDS["byte_fallback"]
    prompt, ids = encode(data[:cut]), [*encode(data[cut:]), SENTENCEPIECE.token_to_id("x")]
    shown = "".join(_stream(decode, ids, prompt))
    assert shown.endswith("x")
    end = decode([*prompt, *ids])[len(decode(prompt)) :]
    assert len(end.replace(REPLACEMENT, "")) <= len(shown.replace(REPLACEMENT, ""))


@pytest.mark.parametrize("kind", tokenizer_files.KINDS)
@settings(max_examples=60)
@given(text=TEXT)
@example(text="naïve café 日本語 12 345 😀😀😀😀😀😀 日本語日本語日本語日本語日本語")
def test_a_prompt_may_end_after_any_token(kind: str, text: str) -> None:
    tokenizer = TRAINED[kind]
    ids = tokenizer.encode(f"x{text}", add_special_tokens=False).ids

    def decode(part: Sequence[int]) -> str:
        return str(tokenizer.decode(list(part), skip_special_tokens=False))

    whole = decode(ids)
    for at in range(1, len(ids) + 1):
        # Up to three tokens at the end of the prompt may have begun a character.
        texts = [decode(ids[: max(0, at - begun)]) for begun in range(4)]
        shown = max(_common(whole, text) for text in texts)
        assert "".join(_stream(decode, ids[at:], ids[:at])) == whole[shown:], at


def test_the_cost_of_a_token_does_not_grow_with_the_text() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return ByteCodec().decode(ids)

    for data in (b"abc" * 400, "日本".encode() * 200, b"\xff" * 600, b"\x80" * 600):
        assert "".join(_stream(decode, data)) == data.decode(errors="replace")
    assert longest < 64


STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=4)


@given(pieces=st.lists(st.text("abc", max_size=5), max_size=8), stops=STOPS)
@example(pieces=["aa", "ab"], stops=["aab"])
@example(pieces=["ab", "ab", "c"], stops=["ababc", "b"])
def test_the_first_stop_is_found_however_the_text_is_split(
    pieces: list[str], stops: list[str]
) -> None:
    matcher = StopMatcher(stops)
    shown, fed, match = "", "", None
    for piece in pieces:
        text, match = matcher.feed(piece)
        shown += text
        fed += piece
        if match is not None:
            break
        assert fed.startswith(shown)
        assert len(shown) == len(fed) - _may_become_a_stop(fed, stops)
    else:
        shown += matcher.flush()
    full = "".join(pieces)
    starts = [full.find(stop) for stop in stops if stop in full]
    if starts:
        assert match in stops
        assert full.startswith(shown + match)
        assert len(shown) <= max(starts)
    else:
        assert (shown, match) == (full, None)


def _may_become_a_stop(text: str, stops: list[str]) -> int:
    """Return how many characters at the end begin a stop string."""
    beginnings = [stop[:n] for stop in stops for n in range(1, len(stop))]
    return max((len(part) for part in beginnings if text.endswith(part)), default=0)


def test_text_that_cannot_become_a_stop_is_shown_at_once() -> None:
    matcher = StopMatcher(["\n\n", "END"])
    assert matcher.feed("a\n") == ("a", None)
    assert matcher.feed("b") == ("\nb", None)
    assert matcher.feed("xE") == ("x", None)
    assert matcher.feed("N") == ("", None)
    assert matcher.feed("X") == ("ENX", None)
    assert matcher.flush() == ""


def test_of_two_stops_at_one_position_the_first_given_counts() -> None:
    assert StopMatcher(["ab", "abc"]).feed("xabcd") == ("x", "ab")
    assert StopMatcher(["abc", "ab"]).feed("xabcd") == ("x", "abc")
