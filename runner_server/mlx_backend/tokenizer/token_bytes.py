"""The bytes that a token stands for, as the tokenizer's decoder takes it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from runner_server.mlx_backend.tokenizer.panics import NO_PANICS

BytesOf = Callable[[int], bytes | None]

_KEPT = 4096
"""Tokens whose bytes are remembered: those that are likely somewhere, in half a MiB."""

_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(_OTHERS)
}
"""GPT-2's alphabet, in which byte-level vocabularies are written."""

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BY_TOKEN = {"Replace", "ByteFallback", "Metaspace", "Strip", "Fuse"}
"""Steps that decode each token for itself, but for what they do at the beginning of a text."""


def bytes_of_tokens(tokenizer: Any) -> BytesOf:
    """Return what tells the bytes of a token; see ``Codec.token_bytes``.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``, which must not be changed any more.
    """
    steps = list(_steps(tokenizer.decoder))
    kinds = [step["type"] for step in steps]
    if kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}:
        return lru_cache(_KEPT)(lambda id_: _in_alphabet(tokenizer.id_to_token(id_)))
    if not steps or not _is_by_token(steps):
        return lambda _id: None
    falls_back = "ByteFallback" in kinds

    def read(id_: int) -> bytes | None:
        token = tokenizer.id_to_token(id_)
        byte = _FALLBACK.fullmatch(token or "") if falls_back else None
        return bytes.fromhex(byte[1]) if byte else _by_repetition(tokenizer, id_)

    return lru_cache(_KEPT)(read)


def _steps(decoder: Any) -> Iterator[dict[str, Any]]:
    described = json.loads(decoder.__getstate__()) if decoder is not None else None
    waiting = [described] if described else []
    while waiting:
        step = waiting.pop(0)
        if step["type"] == "Sequence":
            waiting = [*step["decoders"], *waiting]
        else:
            yield step


def _is_by_token(steps: list[dict[str, Any]]) -> bool:
    kinds = [step["type"] for step in steps]
    if not set(kinds) <= _BY_TOKEN or any(step.get("stop") for step in steps):
        return False
    # What comes after Fuse sees all tokens as one.
    after = kinds[kinds.index("Fuse") :] if "Fuse" in kinds else []
    return set(after) <= {"Fuse", "Strip"}


def _in_alphabet(token: str | None) -> bytes:
    """The bytes of a byte-level token; ids that the tokenizer does not have are none."""
    token = token or ""
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    # An added token may be written in other characters: they stand for themselves.
    return token.encode()


def _by_repetition(tokenizer: Any, id_: int) -> bytes | None:
    """What a token adds behind others like it: at the beginning it may lose its space."""
    with NO_PANICS:
        two, three = (
            tokenizer.decode([id_] * count, skip_special_tokens=False) for count in (2, 3)
        )
    return three[len(two) :].encode() if three.startswith(two) else None
