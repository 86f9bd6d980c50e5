"""Texts and bytes of generated tokens and of their likely alternatives.

The text of a generated token comes from the stream's decoder (``TokenLogprob.text``). Those of
the alternatives are derived from their bytes, because decoding a window of tokens for each
alternative would be slow.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from runner_server.engine.logprobs import TokenLogprob

_WINDOW = 24
"""Context tokens to decode with an alternative whose bytes depend on its neighbours."""

_LONGEST_CHARACTER = 4
"""Most tokens at the end of a prompt that may hold parts of an incomplete character."""


class Decoder(Protocol):
    """The part of ``Codec`` used here."""

    def decode(self, ids: Sequence[int]) -> str:
        """See ``Codec.decode``."""
        ...

    def token_bytes(self, token_id: int) -> bytes | None:
        """See ``Codec.token_bytes``."""
        ...


@dataclass(frozen=True)
class TokenText:
    """Contribution of one token to a text.

    Attributes:
        text: Whole characters, including the one that the token completes.
        data: Bytes of the token, which may be part of a character.
    """

    text: str
    data: bytes


class TokenTexts:
    """Follows one text token by token, to tell what each alternative would have added.

    Args:
        codec: The tokenizer.
        prompt_ids: The prompt.
        end_ids: Tokens that end the text and add nothing to it.
    """

    def __init__(self, codec: Decoder, prompt_ids: Sequence[int], end_ids: frozenset[int]) -> None:
        self._codec = codec
        self._end_ids = end_ids
        self._window = list(prompt_ids[-_WINDOW:])
        # Bytes of an incomplete character.
        self._unfinished = b""
        # Complete characters that the stream's decoder has not returned yet: it holds back U+FFFD.
        self._held = ""
        for id_ in prompt_ids[-_LONGEST_CHARACTER:]:
            self._follow(codec.token_bytes(id_) or b"")

    def read(self, token: TokenLogprob) -> tuple[TokenText, list[TokenText]]:
        """Return the contributions of the next token, and of ``TokenLogprob.others``.

        Args:
            token: The token as reported in an ``OutputDelta``. The last token's text includes
                the text flushed at the end.
        """
        id_ = token.token_id
        data = self._bytes(id_)
        own = TokenText(token.text, token.text.encode() if data is None else data)
        others = [own if other == id_ else self._alternative(other) for other, _ in token.others]
        self._window = [*self._window[1 - _WINDOW :], id_]
        text = self._held + self._follow(own.data)
        self._held = text[len(own.text) :] if text.startswith(own.text) else ""
        return own, others

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
        """Add bytes; return the characters now complete."""
        data = self._unfinished + data
        text, size = _whole(data)
        self._unfinished = data[size:]
        return text


def _whole(data: bytes) -> tuple[str, int]:
    """Decode the whole characters in ``data``; return the text and the number of bytes used."""
    return codecs.utf_8_decode(data, "replace")


def _behind(before: str, text: str) -> str:
    """Return ``text`` without its common prefix with ``before``."""
    pairs = zip(before, text, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(before), len(text)))
    return text[same:]
