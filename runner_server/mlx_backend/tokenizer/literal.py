"""A tokenizer for which special tokens written in a text are text like any other."""

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

    Shares the vocabulary and the steps with the tokenizer that it is made of, and has only the
    added tokens of its own: the library keeps the setting in the tokenizer, which other threads
    use at the same time.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.get_added_tokens_decoder()
        with NO_PANICS:
            self._tokenizer = Tokenizer(tokenizer.model)
            for name in _STEPS:
                if (step := getattr(tokenizer, name)) is not None:
                    setattr(self._tokenizer, name, step)
            self._tokenizer.add_tokens([added[id_] for id_ in sorted(added)])
            self._tokenizer.encode_special_tokens = True
        special = {id_ for id_, token in added.items() if token.special}
        self._special = special - {*self._split(_UNKNOWN)}

    def encode(self, text: str) -> list[int]:
        """Split text into ids, none of which is a special token.

        The unknown token may be among them, for characters that the vocabulary lacks.

        Raises:
            InvalidField: The vocabulary has only the special token for a part of the text. This
                happens with models of tokenizers (Unigram, WordLevel) that look up whole words.
        """
        ids = self._split(text)
        found = next((id_ for id_ in ids if id_ in self._special), None)
        if found is not None:
            token = self._tokenizer.id_to_token(found)
            problem = f"this tokenizer has no other tokens for {token!r} in the text"
            raise InvalidField([("literal", problem)])
        return ids

    def _split(self, text: str) -> list[int]:
        # Only the batch method releases the GIL.
        with NO_PANICS:
            (encoding,) = self._tokenizer.encode_batch([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids
