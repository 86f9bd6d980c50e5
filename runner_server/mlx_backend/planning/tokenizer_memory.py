"""The memory that a tokenizer takes, told from its files.

Measured with tokenizers 0.23.3 on x86-64, in MiB; in use each takes 5 more, for the words that it
has split:

| tokenizer | file | pieces | in memory, heap trimmed | while it is read |
|---|---|---|---|---|
| Llama 2 | 1.7 | 32,000 | 9 (295 bytes a piece) | 19 (218 bytes a text in the file) |
| DeepSeek V3 | 7.5 | 128,000 | 37 (303) | 63 (251) |
| Llama 3 | 8.7 | 128,000 | 41 (336) | 88 (223) |
| GPT-4o | 9.3 | 200,000 | 45 (236) | 80 (209) |
| Qwen 3 | 10.9 | 151,643 | 45 (311) | 122 (280) |
| gpt-oss | 26.6 | 199,998 | 57 (299) | 298 (285) |
| Gemma 3 | 31.8 | 262,144 | 96 (384) | 356 (278) |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PIECE_BYTES = 400
"""Of memory for each piece of the vocabulary and each property of an added token."""

_TEXT_BYTES = 300
"""Of memory for each text of ``tokenizer.json`` while it is read: a piece is one, a merge one or
two, depending on the age of the file."""

_OTHER_FILES = ("tokenizer.model", "vocab.json")
_OTHER_FACTOR, _OTHER_PEAK_FACTOR = 20, 90
"""Bytes for each byte of those: 0.5 MiB of Mistral v1 and v3 become 10 and 11 MiB, and 46."""

_FEWEST_KEYS = 6
"""If only one text in so many is a key, the vocabulary is a list, as Unigram has it."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenizerMemory:
    """The memory of a tokenizer.

    Attributes:
        held_bytes: Once it is read and the heap is trimmed.
        peak_bytes: While it is read, ``held_bytes`` included.
    """

    held_bytes: int
    peak_bytes: int


def tokenizer_memory(path: Path) -> TokenizerMemory:
    """Return what the tokenizer of a model directory takes; nothing if it has none."""
    file = path / "tokenizer.json"
    if file.is_file():
        keys, texts = _count(file)
        pieces = keys if keys * _FEWEST_KEYS > texts else texts
        held = pieces * _PIECE_BYTES
        return TokenizerMemory(held, max(held, texts * _TEXT_BYTES))
    others = (path / name for name in _OTHER_FILES)
    size = next((other.stat().st_size for other in others if other.is_file()), 0)
    return TokenizerMemory(size * _OTHER_FACTOR, size * _OTHER_PEAK_FACTOR)


def _count(file: Path) -> tuple[int, int]:
    """Return how many keys and how many texts a JSON file has, in 30 ms for 32 MiB."""
    keys = quotes = 0
    with file.open("rb") as data:
        while chunk := data.read(_CHUNK_BYTES):
            keys += chunk.count(b'":')
            quotes += chunk.count(b'"')
    return keys, quotes // 2
