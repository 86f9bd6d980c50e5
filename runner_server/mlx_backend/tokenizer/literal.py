"""Tokenizers for which special tokens written in a text are text like any other."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer

from runner_server.errors import InvalidField
from runner_server.mlx_backend.tokenizer.panics import NO_PANICS

_STEPS = ("normalizer", "pre_tokenizer", "decoder", "post_processor")

_UNKNOWN = "\U0010fffd"
"""A character that vocabularies lack, so that it becomes the unknown token, if there is one."""


class LiteralTokenizer:
    """Splits text without special tokens. Thread-safe.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = copy_of(tokenizer, [added[id_] for id_ in sorted(added)])
        self._tokenizer.encode_special_tokens = True
        self._special = special_ids(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Split text into ids, none of which is a special token.

        The unknown token may be among them, for characters that the vocabulary lacks.

        Raises:
            InvalidField: The vocabulary has only the special token for a part of the text. This
                happens with models of tokenizers (Unigram, WordLevel) that look up whole words.
        """
        ids = split(self._tokenizer, text)
        found = next((id_ for id_ in ids if id_ in self._special), None)
        if found is not None:
            raise no_other_tokens(self._tokenizer.id_to_token(found))
        return ids


def copy_of(tokenizer: Any, added: list[Any]) -> Any:
    """Return a tokenizer with the vocabulary and the steps of another, and added tokens of its own.

    The library keeps settings and added tokens in the tokenizer, which other threads use at the
    same time. The vocabulary, which takes the memory, is shared.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``.
        added: The added tokens, in the order of their ids.
    """
    with NO_PANICS:
        copy = Tokenizer(tokenizer.model)
        for name in _STEPS:
            if (step := getattr(tokenizer, name)) is not None:
                setattr(copy, name, step)
        copy.add_tokens(added)
    return copy


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Return the ids of special tokens, without the one for unknown characters."""
    added = tokenizer.get_added_tokens_decoder()
    special = {id_ for id_, token in added.items() if token.special}
    return frozenset(special - {*split(tokenizer, _UNKNOWN)})


def no_other_tokens(token: str) -> InvalidField:
    """Return the refusal of a text with a special token that has no other form."""
    problem = f"this tokenizer has no other tokens for {token!r} in the text"
    return InvalidField([("literal", problem)])


def split(tokenizer: Any, text: str) -> list[int]:
    """Split text into ids."""
    # Only the batch method releases the GIL.
    with NO_PANICS:
        (encoding,) = tokenizer.encode_batch([text], add_special_tokens=False)
    ids: list[int] = encoding.ids
    return ids
