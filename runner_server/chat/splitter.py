"""Division of an answer's text by the model's markers, independent of how the text arrives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from runner_server.chat.format import Transitions


@dataclass(frozen=True)
class Segment:
    """Text of one state, or the marker that begins the state."""

    state: str
    text: str = ""
    marker: str = ""


class AnswerSplitter:
    """State machine over the text of an answer.

    A marker ends the text of a state and begins another state. Markers are matched on text, so
    their split into tokens does not matter, and text that may turn out to begin a marker is held
    back. The first marker to be complete counts, so the same text gives the same parts, however it
    is cut into pieces.

    For example, with ``{"content": (("<think>", "reasoning"),), ...}`` and the state ``content``,
    ``feed("Hi <th")`` gives the text ``"Hi "``, and ``feed("ink>So")`` then the marker
    ``"<think>"`` and the text ``"So"``, both with the state ``reasoning``.

    Args:
        transitions: The markers.
        state: The state in which the text begins.
    """

    def __init__(self, transitions: Transitions, state: str) -> None:
        self._transitions = transitions
        self._held = ""
        self.state = state

    def feed(self, text: str) -> Iterator[Segment]:
        """Add text; yield what it makes certain."""
        self._held += text
        while match := self._first_match():
            begin, end, state = match
            shown, marker = self._held[:begin], self._held[begin:end]
            self._held = self._held[end:]
            if shown:
                yield Segment(self.state, shown)
            self.state = state
            yield Segment(state, marker=marker)
        cut = self._held_from()
        shown, self._held = self._held[:cut], self._held[cut:]
        if shown:
            yield Segment(self.state, shown)

    @property
    def held(self) -> str:
        """The text at the end that may turn out to begin a marker."""
        return self._held

    def flush(self) -> Iterator[Segment]:
        """End the text; yield what was held back."""
        shown, self._held = self._held, ""
        if shown:
            yield Segment(self.state, shown)

    def _first_match(self) -> tuple[int, int, str] | None:
        """Return begin, end and next state of the marker that is complete first."""
        found = [
            (begin + len(marker), begin, state)
            for marker, state in self._transitions.get(self.state, ())
            if (begin := self._held.find(marker)) >= 0
        ]
        if not found:
            return None
        end, begin, state = min(found)
        return begin, end, state

    def _held_from(self) -> int:
        """Return the position from which the held text may be the beginning of a marker."""
        edges = self._transitions.get(self.state, ())
        return min((self._partial(marker) for marker, _ in edges), default=len(self._held))

    def _partial(self, marker: str) -> int:
        """Return the position from which the held text may be the beginning of one marker."""
        held = self._held
        at = held.find(marker[0], max(0, len(held) - len(marker) + 1))
        while at >= 0 and not marker.startswith(held[at:]):
            at = held.find(marker[0], at + 1)
        return at if at >= 0 else len(held)
