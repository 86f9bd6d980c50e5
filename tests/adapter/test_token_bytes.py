"""Bytes of single tokens, which joined equal the tokenizer's decoded text."""

from __future__ import annotations

import codecs
import random
from collections.abc import Callable
from typing import Any

import pytest

from runner_server.engine.backend import LoadedModel
from runner_server.engine.logprobs import TokenLogprob
from runner_server.engine.output.text import StreamDecoder
from runner_server.engine.output.token_text import TokenTexts
from runner_server.mlx_backend.tokenizer.codec import FastCodec
from runner_server.mlx_backend.tokenizer.token_bytes import bytes_of_tokens

tokenizers = pytest.importorskip("tokenizers", reason="no tokenizers (the server extra)")
parts = tokenizers.decoders

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁▁", "a", "▁a", "▁the", "ß", "日", "▁日本", "▁▁b", "é", "\ufffd", "<0xZZ>", "<0x4>"]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, *WORDS]
GEMMA = [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse()]
LLAMA = [*GEMMA, parts.Strip(" ", 1, 0)]


def _words(decoder: Any, pieces: list[str] = PIECES) -> Any:
    vocab = {piece: id_ for id_, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=pieces[0]))
    tokenizer.decoder = decoder
    return tokenizer


def _byte_level() -> Any:
    """Make a tokenizer of every byte, words with partial characters, and added tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = _words(parts.ByteLevel(), [*alphabet, "Ġthe", "æĹ", "¥æľ", "ðŁĺ"])
    tokenizer.add_special_tokens(["<|end|>", "<用户>", "<s>"])
    tokenizer.add_tokens(["  two spaces", "naïve"])
    return tokenizer


KINDS: dict[str, Callable[[], Any]] = {
    "byte level": _byte_level,
    "gemma": lambda: _words(parts.Sequence(GEMMA)),
    "llama": lambda: _words(parts.Sequence(LLAMA)),
    "metaspace": lambda: _words(parts.Metaspace(), [*PIECES[:3], *WORDS]),
    "byte fallback alone": lambda: _words(parts.Sequence([parts.ByteFallback(), parts.Fuse()])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_joined_token_bytes_equal_the_decoded_text(kind: str) -> None:
    tokenizer = KINDS[kind]()
    bytes_of = bytes_of_tokens(tokenizer)
    size = tokenizer.get_vocab_size()
    anchor = tokenizer.token_to_id("a")
    draw = random.Random(3)  # noqa: S311 - not a secret
    for _ in range(3000):
        ids = [anchor, *draw.choices(range(size), k=draw.randrange(1, 9))]
        data = [bytes_of(id_) for id_ in ids]
        assert None not in data
        joined = b"".join(part or b"" for part in data)
        text = tokenizer.decode(ids, skip_special_tokens=False)
        if kind == "byte level" or joined.decode(errors="replace").encode() == joined:
            assert joined.decode(errors="replace") == text, ids


@pytest.mark.parametrize("kind", ["byte level", "gemma", "llama"])
def test_every_byte_has_a_token(kind: str) -> None:
    tokenizer = KINDS[kind]()
    found = {bytes_of_tokens(tokenizer)(id_) for id_ in range(tokenizer.get_vocab_size())}
    assert {bytes([byte]) for byte in range(256)} <= found


def test_unknown_ids_have_no_bytes() -> None:
    """The output layer of a model is often larger than the vocabulary."""
    for make in KINDS.values():
        tokenizer = make()
        missing = tokenizer.get_vocab_size() + 5
        assert tokenizer.decode([missing], skip_special_tokens=False) == ""
        assert bytes_of_tokens(tokenizer)(missing) == b""


def test_byte_tokens_are_literal_text_without_byte_fallback() -> None:
    tokenizer = _words(parts.Metaspace())
    assert bytes_of_tokens(tokenizer)(PIECES.index("<0x41>")) == b"<0x41>"


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        parts.WordPiece(),
        parts.BPEDecoder(),
        parts.CTC(),
        parts.Sequence([parts.Fuse(), parts.Replace("a b", "c")]),
        parts.Sequence([parts.Fuse(), parts.Strip(" ", 0, 1)]),
    ],
    ids=repr,
)
def test_bytes_are_unknown_for_context_dependent_decoders(decoder: Any) -> None:
    tokenizer = _words(decoder) if decoder is not None else _words(parts.Fuse())
    if decoder is None:
        tokenizer.decoder = None
    assert bytes_of_tokens(tokenizer)(PIECES.index("a")) is None


def test_a_word_keeps_the_leading_space_that_the_decoder_strips() -> None:
    for kind in ("llama", "gemma"):
        bytes_of = bytes_of_tokens(KINDS[kind]())
        assert bytes_of(PIECES.index("▁the")) == b" the"
        assert bytes_of(PIECES.index("▁")) == b" "


def test_token_bytes_of_loaded_models_join_to_the_text(
    tiny: LoadedModel, trained: LoadedModel
) -> None:
    for model in (tiny, trained):
        text = "naïve 日本 😀 def f(x):\n\t<eos>"
        ids = model.codec.encode(text, as_prompt=False)
        assert b"".join(model.codec.token_bytes(id_) or b"" for id_ in ids).decode() == text


def _is_sound(data: bytes) -> bool:
    """Return whether data is UTF-8, apart from an incomplete character at the end."""
    try:
        codecs.utf_8_decode(data)
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_alternatives_have_the_text_that_the_stream_would_show(kind: str) -> None:
    tokenizer = KINDS[kind]()
    codec, size = FastCodec(tokenizer, [], None), tokenizer.get_vocab_size()
    prompt = [tokenizer.token_to_id("a")]
    draw = random.Random(4)  # noqa: S311 - not a secret
    for _ in range(200):
        ids = draw.choices(range(size), k=6)
        texts, stream = TokenTexts(codec, prompt, frozenset()), StreamDecoder(codec.decode, prompt)
        for position, id_ in enumerate(ids):
            top = tuple((other, -1.0) for other in draw.choices(range(size), k=5) if other != id_)
            _, others = texts.read(TokenLogprob(id_, -1.0, top, stream.push(id_)))
            for (other, _), alternative in zip(top, others, strict=True):
                instead = StreamDecoder(codec.decode, prompt)
                shown = [instead.push(before) for before in [*ids[:position], other]][-1]
                # A byte-fallback decoder replaces every byte of an invalid run.
                data = b"".join(codec.token_bytes(id_) or b"" for id_ in [*ids[:position], other])
                if kind == "byte level" or _is_sound(data):
                    assert alternative.text.rstrip("\ufffd") == shown.rstrip("\ufffd"), ids
