"""What generated tokens, and those that were likely in their place, add to a text.

Of a generated token the completion knows it (``TokenLogprob.text``). Of the others it is
told here from their bytes, without decoding the text with each of them.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runner_server.engine.types import TokenLogprob

_WINDOW = 24
"""Tokens decoded before an alternative where its bytes depend on its neighbours."""

_LONGEST_CHARACTER = 4
"""Tokens of the prompt that may hold parts of a character that goes on behind it."""


class Decoder(Protocol):
    """What is needed of a ``Codec``."""

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Codec.decode``."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """See ``Codec.token_bytes``."""
        ...


@dataclass(frozen=True)
class TokenText:
    """What a token adds to a text.

    Attributes:
        text: Whole characters; those that it completes are its own.
        data: Its bytes, which may be a part of a character.
    """

    text: str
    data: bytes


class TokenTexts:
    """Follows one text, token by token.

    Args:
        codec: The tokenizer.
        prompt_ids: What comes before the text.
        end_ids: Tokens that end it, and add nothing.
    """

    def __init__(self, codec: Decoder, prompt_ids: Sequence[int], end_ids: frozenset[int]) -> None:
        self._codec = codec
        self._end_ids = end_ids
        self._window = list(prompt_ids[-_WINDOW:])
        # The bytes of a character that is not whole yet.
        self._unfinished = b""
        # Characters that the completion has not shown: U+FFFD, which it may hold back.
        self._held = ""
        for id_ in prompt_ids[-_LONGEST_CHARACTER:]:
            self._follow(codec.token_bytes(id_) or b"")

    def read(self, token: TokenLogprob) -> tuple[TokenText, list[TokenText]]:
        """Tell what the next token adds, and what the likeliest in its place would have.

        Args:
            token: As the completion reports it. A text that the end of the completion brings,
                because nothing follows, is its last token's.
        """
        id_ = token.token_id
        data = self._bytes(id_)
        own = TokenText(token.text, token.text.encode() if data is None else data)
        top = [own if other == id_ else self._alternative(other) for other, _ in token.top]
        self._window = [*self._window[1 - _WINDOW :], id_]
        text = self._held + self._follow(own.data)
        self._held = text[len(own.text) :] if text.startswith(own.text) else ""
        return own, top

    def _bytes(self, id_: int) -> bytes | None:
        return b"" if id_ in self._end_ids else self._codec.token_bytes(id_)

    def _alternative(self, id_: int) -> TokenText:
        data = self._bytes(id_)
        if data is None:
            decode = self._codec.decode
            text = _behind(decode(self._window), decode([*self._window, id_]))
            return TokenText(text, text.encode())
        return TokenText(self._held + _whole(self._unfinished + data)[0], data)

    def _follow(self, data: bytes) -> str:
        """Take bytes that follow; returns the characters that are whole now."""
        data = self._unfinished + data
        text, size = _whole(data)
        self._unfinished = data[size:]
        return text


def _whole(data: bytes) -> tuple[str, int]:
    """The characters of bytes, and how many bytes they take: a character may go on later."""
    return codecs.utf_8_decode(data, "replace")


def _behind(before: str, text: str) -> str:
    """What a text has behind another, as far as that is still its beginning."""
    pairs = zip(before, text, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(text)))
    return text[same:]
