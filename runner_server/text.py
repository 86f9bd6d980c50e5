"""From token ids to text that may be shown: whole characters, no stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"

_MAX_WINDOW = 24
"""Tokens decoded again with each new one; more are cut down to the few below."""

_MIN_WINDOW = 6
"""Tokens kept as left context: what a tokenizer's decoder may look back on."""

_MAX_PENDING = 3
"""Replacement characters that can still become a character: UTF-8 needs four bytes."""


class StreamDecoder:
    """Decodes a growing list of ids into text, whole characters only.

    All returned pieces joined are ``decode(prompt + ids)`` without its beginning
    ``decode(prompt)``. The last ids are decoded again with each new one, because
    a byte-level token may hold a part of a character and some decoders treat the
    first token of a text in their own way.

    Args:
        decode: The tokenizer's decoder.
        prompt_ids: What comes before the text; its end serves as context.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window = list(prompt_ids[-_MIN_WINDOW:])
        self._shown = len(decode(self._window))

    def push(self, token_id: int) -> str:
        """Adds an id and returns the text that is now certain; often none or one piece."""
        self._window.append(token_id)
        text = self._decode(self._window)
        certain = len(text) - _pending(text)
        piece = text[self._shown : certain]
        self._shown = max(self._shown, certain)
        if len(self._window) > _MAX_WINDOW and certain == len(text):
            self._shrink()
        return piece

    def flush(self) -> str:
        """Returns what was held back, once nothing follows."""
        text = self._decode(self._window)
        piece = text[self._shown :]
        self._shown = len(text)
        return piece

    def _shrink(self) -> None:
        """Drops the window's beginning, but never cuts through a character."""
        for size in range(_MIN_WINDOW, _MAX_WINDOW):
            tail = self._window[-size:]
            text = self._decode(tail)
            if text and not text.startswith(REPLACEMENT):
                self._window, self._shown = tail, len(text)
                return


def _pending(text: str) -> int:
    """How many characters at the end may still change."""
    count = 0
    while count < _MAX_PENDING and text.endswith(REPLACEMENT, 0, len(text) - count):
        count += 1
    return count


class StopMatcher:
    """Finds the first of some strings in text that arrives in pieces.

    Matching is on text, not on tokens, so it does not matter how the model
    happened to split the string.

    Args:
        stops: Strings that end the text; none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Takes the next piece.

        Returns:
            The text that may be shown, and the stop string that was found, if one
            was; text that may be the beginning of one is held back.
        """
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda pair: pair[0])
            shown, self._held = self._held[:at], ""
            return shown, stop
        cut = min((self._partial(stop) for stop in self._stops), default=len(self._held))
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown, None

    def flush(self) -> str:
        """Returns what was held back, once nothing follows."""
        held, self._held = self._held, ""
        return held

    def _partial(self, stop: str) -> int:
        """Where the longest end of the held text that begins ``stop`` starts."""
        held = self._held
        at = held.find(stop[0], max(0, len(held) - len(stop) + 1))
        while at >= 0 and not stop.startswith(held[at:]):
            at = held.find(stop[0], at + 1)
        return at if at >= 0 else len(held)
