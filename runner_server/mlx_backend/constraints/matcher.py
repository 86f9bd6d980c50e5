"""The position of one text in a grammar."""

from __future__ import annotations

from array import array
from copy import copy
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_REASON_CHARS = 200


class RowMatcher(Protocol):
    """What limits the tokens of a row."""

    @property
    def inner(self) -> LLMatcher | None:
        """Llguidance's matcher of the next token; None if ``mask`` has the tokens."""
        ...

    @property
    def mask(self) -> array[int] | None:
        """Bits of the allowed tokens; None if ``inner`` has them."""
        ...

    @property
    def also(self) -> int | None:
        """A token that is allowed in addition to those of ``inner``."""
        ...

    def consume(self, token_id: int) -> None:
        """Advance by a token."""
        ...

    @property
    def failure(self) -> str:
        """Why no token can continue the text; empty if one can."""
        ...

    def fork(self) -> GrammarMatcher | None:
        """Return a matcher that continues the same text; None if a grammar is not all there is."""
        ...


class GrammarMatcher:
    """Implements ``runner_server.engine.backend.Matcher`` with llguidance.

    An error of llguidance is a state of its matcher, not an exception, and a matcher with an error
    allows only the end of the text: check :attr:`failure` after each use.

    Args:
        start: A matcher at the beginning of a text, which is copied.
        tokenizer: The tokenizer of ``start``.

    Attributes:
        inner: llguidance's matcher.
        mask: None: ``inner`` has the mask of the next token.
        also: None: no token is allowed in addition.
    """

    mask: array[int] | None = None
    also: int | None = None

    def __init__(self, start: LLMatcher, tokenizer: LLTokenizer) -> None:
        self._start = start
        self._tokenizer = tokenizer
        self.inner: LLMatcher = start.deep_copy()

    def consume(self, token_id: int) -> None:
        """Advance by a token."""
        self.inner.consume_token(token_id)

    @property
    def failure(self) -> str:
        """Why no token can continue the text; empty if one can."""
        return first_line(self.inner.get_error()) if self.inner.is_error() else ""

    def fork(self) -> GrammarMatcher:
        """Return a matcher that continues the same text, in 2 us."""
        other = copy(self)
        other.inner = self.inner.deep_copy()
        return other

    @property
    def is_satisfied(self) -> bool:
        """True if the text so far obeys the constraint; see ``Matcher.is_satisfied``."""
        return self.inner.is_accepting()

    def accepts(self, text: str) -> bool:
        """Return whether another text would obey the constraint; see ``Matcher.accepts``."""
        ids = self._tokenizer.greedy_tokenize(text)
        other = self._start.deep_copy()
        return other.try_consume_tokens(ids) == len(ids) and other.is_accepting()


def first_line(error: str) -> str:
    """Return the first line of an error of llguidance, whose others are its internal state."""
    line = next(iter(error.splitlines()), "")[:_MAX_REASON_CHARS]
    return "the grammar allows no further text" if line.startswith("NoExtension") else line
