"""Names of blocks: digests of all inputs of keys and values."""

from __future__ import annotations

import hashlib
from array import array

BLOCK_TOKENS = 128
"""Tokens of a block. At most this many, less one, of a known beginning are evaluated again; 16 MiB
of an 8B model with 128 KiB per token."""

_NAME_BYTES = 16


def block_names(model_key: bytes, salt: str, tokens: array[int]) -> list[str]:
    """Return the names of the whole blocks of a sequence.

    A name is the digest of the model's key, the salt and all tokens up to the end of the block, so
    that equal beginnings have equal names, and no name reveals a token or a salt.

    Args:
        model_key: Digest of all that determines the keys and values of given tokens.
        salt: Sequences with different salts share no names.
        tokens: The sequence, from its beginning.
    """
    digest = hashlib.blake2b(salt.encode(), digest_size=_NAME_BYTES, key=model_key).digest()
    names = []
    for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        run = tokens[start : start + BLOCK_TOKENS].tobytes()
        digest = hashlib.blake2b(digest + run, digest_size=_NAME_BYTES).digest()
        names.append(digest.hex())
    return names
