"""From token ids to text that may be shown: whole characters, no stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

REPLACEMENT = "\ufffd"

_MAX_WINDOW = 24
"""Tokens decoded again with each new one; more are cut down to the few below."""

_MIN_WINDOW = 6
"""Tokens kept as left context: what a tokenizer's decoder may look back on."""

_MAX_PENDING = 3
"""Replacement characters that can still become a character: UTF-8 needs four bytes. So many
tokens at the end of a prompt may be the beginning of one."""


class StreamDecoder:
    """Decodes a growing list of ids into text, whole characters only.

    All returned pieces joined are ``decode(prompt + ids)`` without its beginning
    ``decode(prompt)``; if the prompt ends within a character, they begin with that whole
    character. The last ids are decoded again with each new one, because a byte-level
    token may hold a part of a character and some decoders treat the first token of a
    text in their own way.

    A decoder with byte fallback (Llama 2, Gemma) takes a run of bytes as one: while
    its last character is not whole, or one of its bytes is wrong, all of it turns into
    replacement characters. What was shown then stays, and the rest waits for the end of
    the run.

    Args:
        decode: The tokenizer's decoder.
        prompt_ids: What comes before the text; its end serves as context.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window, self._begun = self._context(prompt_ids)
        self._shown = decode(self._window)

    def _context(self, prompt_ids: Sequence[int]) -> tuple[list[int], int]:
        """Return the end of a prompt, and where in its text an unfinished character begins.

        The tokens of such a character have to be told from those before it: a decoder with
        byte fallback makes nothing but replacement characters of whole ones beside it.
        """
        window = self._aligned(prompt_ids)
        if self._decode(window).endswith(REPLACEMENT):
            for size, begun in _splits(len(prompt_ids)):
                end = max(0, len(prompt_ids) - begun)
                start = max(0, end - size)
                before = self._decode(prompt_ids[start:end])
                if not (before.startswith(REPLACEMENT) or before.endswith(REPLACEMENT)):
                    return list(prompt_ids[start:]), len(before)
        return window, 0

    def _aligned(self, prompt_ids: Sequence[int]) -> list[int]:
        """Return the end of a prompt, cut between two characters if that is possible."""
        window = list(prompt_ids[-_MIN_WINDOW:])
        for size in range(_MIN_WINDOW + 1, min(len(prompt_ids), _MAX_WINDOW) + 1):
            if not self._decode(window).startswith(REPLACEMENT):
                break
            window = list(prompt_ids[-size:])
        return window

    def push(self, token_id: int) -> str:
        """Adds an id and returns the text that is now certain; often none or one piece."""
        self._window.append(token_id)
        text = self._decode(self._window)
        in_run = text.endswith(REPLACEMENT) and not text.startswith(self._shown)
        if in_run and len(self._window) <= 2 * _MAX_WINDOW:
            return ""
        piece = self._show(text, len(text) - _pending(text))
        return piece + self._shrink(text) if len(self._window) > _MAX_WINDOW else piece

    def flush(self) -> str:
        """Returns what was held back, once nothing follows."""
        text = self._decode(self._window)
        return self._show(text, len(text))

    def _show(self, text: str, end: int) -> str:
        start = self._start(text)
        if end <= start:
            return ""
        self._shown, self._begun = text[:end], 0
        return text[start:end]

    def _start(self, text: str) -> int:
        """Where the part of the window's text that was not shown begins."""
        shown = self._shown
        if text.startswith(shown):
            return len(shown)
        pairs = enumerate(zip(text, shown, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(text), len(shown)))
        if not shown[common:].strip(REPLACEMENT):
            # The prompt ended within a character, which is whole now.
            return max(common, self._begun)
        if not text.startswith(REPLACEMENT, common):
            return len(shown)
        # A run of bytes went wrong: each byte that was shown as text is a character now.
        return common + len(shown[common:].replace(REPLACEMENT, "?").encode())

    def _shrink(self, text: str) -> str:
        """Drops the window's beginning; returns text that cannot wait because of it."""
        held = text[len(self._shown) :]
        for size in range(_MIN_WINDOW, _MAX_WINDOW):
            tail = self._decode(self._window[-size:])
            # Never cut through a character.
            if tail and not tail.startswith(REPLACEMENT) and tail.endswith(held):
                self._cut(size, tail, len(held))
                return ""
        if len(self._window) <= 2 * _MAX_WINDOW:
            return ""
        # Nothing but bytes that are no text, for long.
        tail = self._decode(self._window[-_MIN_WINDOW:])
        waits = tail.endswith(held)
        self._cut(_MIN_WINDOW, tail, len(held) if waits else 0)
        return "" if waits else held

    def _cut(self, size: int, text: str, held: int) -> None:
        self._window = self._window[-size:]
        self._shown, self._begun = text[: len(text) - held], 0


def _splits(tokens: int) -> Iterator[tuple[int, int]]:
    """Yield how many tokens to try as context, and how many may have begun a character."""
    most = min(tokens, _MAX_WINDOW)
    sizes = range(min(_MIN_WINDOW, most), most + 1)
    # If the character before it has one byte, several counts fit: the lowest is right.
    return ((size, begun) for begun in range(1, _MAX_PENDING + 1) for size in sizes)


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
