"""Incremental decoding of token ids into whole characters, and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

REPLACEMENT = "\ufffd"

_MAX_WINDOW = 24
"""Most tokens decoded again with each new one. A longer window is cut back to a few tokens."""

_MIN_WINDOW = 6
"""Tokens kept as left context, on which a tokenizer's decoder may depend."""

_MAX_PENDING = 3
"""Most replacement characters at the end of a text that may still become one character, because
UTF-8 has at most four bytes. A prompt may end with as many tokens of an incomplete character."""


class StreamDecoder:
    """Incremental decoder of token ids, which returns whole characters only.

    The returned texts join to ``decode(prompt + ids)`` without the prefix ``decode(prompt)``. If
    the prompt ends within a character, they begin with the whole of that character. A window of the
    last ids is decoded again with each new one, because a byte-level token may be a part of a
    character, and because some decoders treat the first token of a text differently.

    For example, if token 2 is the byte C3 and token 3 the byte A9, which make ``é`` together:
    ``push(1)`` returns ``"caf"``; ``push(2)`` returns ``""``, because ``decode([1, 2])`` ends with
    U+FFFD, which may still become a character; ``push(3)`` returns ``"é"``. If the text ended after
    token 2, ``flush()`` would return the U+FFFD.

    A decoder with byte fallback (Llama 2, Gemma) decodes a run of bytes as a unit: while its last
    character is incomplete, or one of its bytes is invalid, the whole run becomes replacement
    characters. Text already returned then stays, and the rest waits for the end of the run. For
    example, with the bytes 41 (``A``), E2 82 AC (``€``), the invalid FF, and a token ``!``, which
    ends the run, the calls of ``push`` return ``"A"``, ``""``, ``""``, ``"€"``, ``""`` and U+FFFD
    with ``"!"``: one replacement character for FF, although the decoder now gives five for the run.

    Args:
        decode: The tokenizer's decoder.
        prompt_ids: The prompt, whose end serves as context.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int]) -> None:
        self._decode = decode
        self._window, self._begun = self._context(prompt_ids)
        self._shown = decode(self._window)

    def _context(self, prompt_ids: Sequence[int]) -> tuple[list[int], int]:
        """Return the end of a prompt, and the position of an incomplete character in its text.

        The tokens of an incomplete character must be told apart from the preceding ones: a decoder
        with byte fallback turns adjacent whole characters into replacement characters too.
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
        """Return the end of a prompt, cut between two characters if possible."""
        window = list(prompt_ids[-_MIN_WINDOW:])
        for size in range(_MIN_WINDOW + 1, min(len(prompt_ids), _MAX_WINDOW) + 1):
            if not self._decode(window).startswith(REPLACEMENT):
                break
            window = list(prompt_ids[-size:])
        return window

    def push(self, token_id: int) -> str:
        """Add an id; return the text no later id can change, possibly empty."""
        self._window.append(token_id)
        text = self._decode(self._window)
        in_run = text.endswith(REPLACEMENT) and not text.startswith(self._shown)
        if in_run and len(self._window) <= 2 * _MAX_WINDOW:
            return ""
        piece = self._show(text, len(text) - _pending(text))
        return piece + self._shrink(text) if len(self._window) > _MAX_WINDOW else piece

    def flush(self) -> str:
        """End the input; return the rest of the text."""
        text = self._decode(self._window)
        return self._show(text, len(text))

    def _show(self, text: str, end: int) -> str:
        start = self._start(text)
        if end <= start:
            return ""
        self._shown, self._begun = text[:end], 0
        return text[start:end]

    def _start(self, text: str) -> int:
        """Return the position in the window's text after the text already returned."""
        shown = self._shown
        if text.startswith(shown):
            return len(shown)
        pairs = enumerate(zip(text, shown, strict=False))
        common = next((i for i, (a, b) in pairs if a != b), min(len(text), len(shown)))
        if not shown[common:].strip(REPLACEMENT):
            # The prompt ended within a character, which is now complete.
            return max(common, self._begun)
        if not text.startswith(REPLACEMENT, common):
            return len(shown)
        # A run of bytes turned out to be invalid: each byte of the shown text is now a U+FFFD.
        return common + len(shown[common:].replace(REPLACEMENT, "?").encode())

    def _shrink(self, text: str) -> str:
        """Drop the beginning of the window; return text no longer held back."""
        held = text[len(self._shown) :]
        for size in range(_MIN_WINDOW, _MAX_WINDOW):
            tail = self._decode(self._window[-size:])
            # Do not cut through a character.
            if tail and not tail.startswith(REPLACEMENT) and tail.endswith(held):
                self._cut(size, tail, len(held))
                return ""
        if len(self._window) <= 2 * _MAX_WINDOW:
            return ""
        # A long run of invalid bytes.
        tail = self._decode(self._window[-_MIN_WINDOW:])
        waits = tail.endswith(held)
        self._cut(_MIN_WINDOW, tail, len(held) if waits else 0)
        return "" if waits else held

    def _cut(self, size: int, text: str, held: int) -> None:
        self._window = self._window[-size:]
        self._shown, self._begun = text[: len(text) - held], 0


def _splits(tokens: int) -> Iterator[tuple[int, int]]:
    """Yield candidate pairs: number of context tokens, number of tokens in the last character."""
    most = min(tokens, _MAX_WINDOW)
    sizes = range(min(_MIN_WINDOW, most), most + 1)
    # Several numbers fit if the character before has one byte; the lowest is right.
    return ((size, begun) for begun in range(1, _MAX_PENDING + 1) for size in sizes)


def _pending(text: str) -> int:
    """Return the number of characters at the end of a text that may still change."""
    count = 0
    while count < _MAX_PENDING and text.endswith(REPLACEMENT, 0, len(text) - count):
        count += 1
    return count


class StopMatcher:
    """Finds the first stop string in a stream of text.

    Matching is on text, so the model's split of a stop string into tokens does not matter. For
    example, with the stop string ``"END"``: ``feed("the E")`` shows ``"the "`` and holds ``"E"``
    back; then ``feed("nd")`` shows ``"End"``, while ``feed("ND of")`` shows nothing and returns the
    stop string.

    Args:
        stops: Strings that end the text; not empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Add text.

        Returns:
            The text that may be shown, and the stop string found, or None. Text that may begin
            a stop string is held back.
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
        """End the input; return the text held back."""
        held, self._held = self._held, ""
        return held

    def _partial(self, stop: str) -> int:
        """Return the position from which the held text may be the beginning of ``stop``.

        Without such a position, return the length of the held text.
        """
        held = self._held
        at = held.find(stop[0], max(0, len(held) - len(stop) + 1))
        while at >= 0 and not stop.startswith(held[at:]):
            at = held.find(stop[0], at + 1)
        return at if at >= 0 else len(held)
