"""The tokens of a model as llguidance sees them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from llguidance._tokenizer import TokenizerWrapper

    from runner_server.mlx_backend.tokenizer.codec import FastCodec


class Vocabulary:
    """The bytes of every token, with the attributes that llguidance expects of a tokenizer.

    llguidance can also read ``tokenizer.json`` itself, but then it keeps a second tokenizer, and
    its bytes may differ from those that the decoder writes.

    Args:
        codec: The tokenizer, which knows the bytes of its tokens.
        size: Number of token ids that the output layer scores. Ids beyond the tokenizer get no
            bytes, so that no mask includes them.
        end_ids: The tokens that end a text, at least one, all of them less than ``size``.
    """

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, codec: FastCodec, size: int, end_ids: Collection[int]) -> None:
        known = min(size, codec.vocab_size)
        self.eos_token_id = min(end_ids)
        self.tokens = [codec.token_bytes(id_) or b"" for id_ in range(known)]
        self.tokens += [b""] * (size - known)
        self.special_token_ids = [id_ for id_ in {*codec.special_ids, *end_ids} if id_ < size]

    def __call__(self, text: str) -> list[int]:
        """Refuse to tokenize: only grammars with forced tokens need that."""
        raise NotImplementedError(text)


def read_vocabulary(codec: FastCodec, size: int, end_ids: Collection[int]) -> LLTokenizer:
    """Return llguidance's tokenizer; see :class:`Vocabulary` for the arguments.

    Takes 4 ms for 2,048 tokens, and half a second for 151,936.
    """
    import llguidance  # noqa: PLC0415 - the server works without it

    vocabulary = Vocabulary(codec, size, end_ids)
    tokenizer = llguidance.LLTokenizer(
        cast("TokenizerWrapper", vocabulary), eos_token=sorted(end_ids)
    )
    # llguidance keeps the object, and has copied the bytes.
    vocabulary.tokens = []
    return tokenizer
