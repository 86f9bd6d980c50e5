"""Bytes of single tokens, as written by the tokenizer's decoder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from runner_server.mlx_backend.tokenizer.panics import NO_PANICS

BytesOf = Callable[[int], bytes | None]

_KEPT = 4096
"""Number of tokens whose bytes are cached, in half a MiB: enough for the likely ones."""

_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + i): byte for i, byte in enumerate(_OTHERS)
}
"""GPT-2's alphabet of byte-level vocabularies: one character for each byte."""

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_BY_TOKEN = {"Replace", "ByteFallback", "Metaspace", "Strip", "Fuse"}
"""Decoder steps that process each token separately, except at the beginning of a text."""


def bytes_of_tokens(tokenizer: Any) -> BytesOf:
    """Return a function from token id to bytes; see ``Codec.token_bytes``.

    The decoder's type decides how:

    - ``ByteLevel`` (GPT-2, Llama 3): a token is written in an alphabet with one character for each
      byte. ``Ġthe`` stands for 20 74 68 65 (" the"), ``Ã`` for C3, the first half of "é".
    - ``ByteFallback`` and other steps that decode each token separately (Llama 2): ``<0xC3>``
      stands for C3. For any other token, the text of two copies is compared with that of three:
      ``▁the`` decodes to "the the" and "the the the", so one more copy adds " the". The first copy
      cannot be used, because it loses its space at the beginning of a text.
    - Any other decoder: None, because a token's bytes may depend on its neighbours.

    Args:
        tokenizer: A ``tokenizers.Tokenizer``, which must not change afterwards.
    """
    steps = list(_steps(tokenizer.decoder))
    kinds = [step["type"] for step in steps]
    if kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}:
        return lru_cache(_KEPT)(lambda id_: _in_alphabet(tokenizer.id_to_token(id_)))
    if depends_on_neighbours(tokenizer):
        return lambda _id: None
    falls_back = "ByteFallback" in kinds

    def read(id_: int) -> bytes | None:
        token = tokenizer.id_to_token(id_)
        byte = _FALLBACK.fullmatch(token or "") if falls_back else None
        return bytes.fromhex(byte[1]) if byte else _by_repetition(tokenizer, id_)

    return lru_cache(_KEPT)(read)


def depends_on_neighbours(tokenizer: Any) -> bool:
    """Return whether the bytes of a token may depend on its neighbours."""
    steps = list(_steps(tokenizer.decoder))
    kinds = [step["type"] for step in steps]
    if kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}:
        return False
    return not steps or not _is_by_token(steps)


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
    # Steps after Fuse process the whole text as one token.
    after = kinds[kinds.index("Fuse") :] if "Fuse" in kinds else []
    return set(after) <= {"Fuse", "Strip"}


def _in_alphabet(token: str | None) -> bytes:
    """Return the bytes of a byte-level token; empty for an unknown id."""
    token = token or ""
    if all(char in _BYTE_OF for char in token):
        return bytes(_BYTE_OF[char] for char in token)
    # Added tokens may contain other characters, which stand for themselves.
    return token.encode()


def _by_repetition(tokenizer: Any, id_: int) -> bytes | None:
    """Return the bytes added by a third copy of a token to the text of two copies."""
    with NO_PANICS:
        two, three = (
            tokenizer.decode([id_] * count, skip_special_tokens=False) for count in (2, 3)
        )
    return three[len(two) :].encode() if three.startswith(two) else None
