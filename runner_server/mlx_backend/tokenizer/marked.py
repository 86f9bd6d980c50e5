"""A tokenizer for texts in which some special tokens count as such, and others are text."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from functools import lru_cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, normalizers

from runner_server.mlx_backend.tokenizer.literal import (
    copy_of,
    no_other_tokens,
    special_ids,
    split,
)
from runner_server.mlx_backend.tokenizer.panics import NO_PANICS

_REST = ""
"""The token of everything else; no added token is empty."""

_MARKER = re.compile(r"[^\w\s].*\w.*[^\w\s]", re.DOTALL)
"""Added tokens between brackets of any kind; others are words, spaces and line breaks."""


class MarkedTokenizer:
    """Implements ``MarkedCodec``, thread-safe.

    A mark follows the first character of a token. The library looks for added tokens first, and
    does not find those with a mark. The first step after that removes the marks, so what is between
    two tokens that count is split as one text, as if the marked ones were not in the vocabulary: no
    border of what a user wrote changes the tokens.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``.
        template: A text. The markers among the added tokens that are in it are treated like special
            tokens.
    """

    def __init__(self, tokenizer: Any, template: str) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        named = {
            id_
            for id_, token in added.items()
            if token.content in template and _MARKER.fullmatch(token.content)
        }
        self._special = special_ids(tokenizer) | named
        special = {t.content: id_ for id_, t in added.items() if t.special or id_ in named}
        self._added = [_found_as_written(added[id_], special) for id_ in sorted(added)]
        self._finder = _finder([token.content for token in self._added if not token.normalized])
        self._ids = {self._finder.token_to_id(content): id_ for content, id_ in special.items()}
        self._sorted = sorted(special)
        self._begins = frozenset(content[0] for content in special)
        self._longest = max(map(len, special), default=0)
        # Other marks than the first are for texts with the first, so hardly ever needed.
        self._copy = lru_cache(2)(self._make_copy)

    def mark(self, texts: Sequence[str], mark: str) -> list[str]:
        """Return texts with marks; see ``MarkedCodec.mark``."""
        with NO_PANICS:
            found = self._finder.encode_batch(list(texts), add_special_tokens=False)
        return [self._mark(*pair, mark) for pair in zip(texts, found, strict=True)]

    def encode(self, text: str, mark: str) -> list[int]:
        """Split a text into ids, and remove its marks; see ``MarkedCodec.encode``."""
        ids = split(self._copy(mark), text)
        written = (self._ids.get(id_) for id_ in split(self._finder, text))
        expected = [id_ for id_ in written if id_ in self._special]
        found = [id_ for id_ in ids if id_ in self._special]
        if found != expected:
            wrong = next(iter(Counter(found) - Counter(expected) or expected))
            raise no_other_tokens(self._tokenizer.id_to_token(wrong))
        return ids

    def _mark(self, text: str, found: Any, mark: str) -> str:
        begins = {
            begin
            for id_, (begin, _) in zip(found.ids, found.offsets, strict=True)
            if id_ in self._ids
        }
        cuts = [begin + 1 for begin in sorted(begins.union(self._begun(text)))]
        pieces = zip([0, *cuts], [*cuts, len(text)], strict=True)
        return mark.join(text[begin:end] for begin, end in pieces)

    def _begun(self, text: str) -> Iterator[int]:
        """Yield where special tokens begin that end after the text, or after its white space.

        Many templates remove the white space around a text.
        """
        for end in (len(text), len(text.rstrip())):
            for at in range(max(0, end - self._longest + 1), end):
                if text[at] in self._begins and self._is_begin(text[at:end]):
                    yield at

    def _is_begin(self, text: str) -> bool:
        """Return whether a special token begins with a text and goes on."""
        index = bisect_left(self._sorted, text)
        after = self._sorted[index : index + 2]
        return any(content.startswith(text) and content != text for content in after)

    def _make_copy(self, mark: str) -> Any:
        copy = copy_of(self._tokenizer, self._added)
        steps = [normalizers.Replace(mark, "")]
        if self._tokenizer.normalizer is not None:
            steps.append(self._tokenizer.normalizer)
        copy.normalizer = normalizers.Sequence(steps)
        return copy


def _found_as_written(token: Any, special: Container[str]) -> Any:
    """Return an added token; if it is special, one that is looked for before the other steps."""
    if token.content not in special or not token.normalized:
        return token
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=False,
        special=token.special,
    )


def _finder(contents: Sequence[str]) -> Any:
    """Return a tokenizer that finds added tokens like the library, and leaves the rest whole."""
    with NO_PANICS:
        finder = Tokenizer(models.WordLevel({_REST: 0}, unk_token=_REST))
        finder.add_tokens([AddedToken(content, normalized=False) for content in contents])
    return finder
