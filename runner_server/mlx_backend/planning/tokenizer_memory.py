"""Estimate of a tokenizer's memory from its files.

Measured with tokenizers 0.23.3 on x86-64, in MiB. In use, a tokenizer takes 5 MiB more, for its
cache of split words:

| tokenizer | file | vocabulary | in memory, heap trimmed | peak while reading |
|---|---|---|---|---|
| Llama 2 | 1.7 | 32,000 | 9 (295 bytes an entry) | 19 (218 bytes a string in the file) |
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

_ENTRY_BYTES = 400
"""Memory per vocabulary entry and per property of an added token."""

_STRING_BYTES = 300
"""Peak memory per string in ``tokenizer.json``. A vocabulary entry is one string; a merge is one
string in older files and two in newer ones."""

_OTHER_FILES = ("tokenizer.model", "vocab.json")
_OTHER_FACTOR, _OTHER_PEAK_FACTOR = 20, 90
"""Memory per byte of those files: 0.5 MiB of Mistral v1 and v3 become 10 and 11 MiB, with a peak of
46 MiB."""

_FEWEST_KEYS = 6
"""Fewest strings per key if the vocabulary is a list, as in Unigram models, and not an object."""

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TokenizerMemory:
    """The memory of a tokenizer.

    Attributes:
        held_bytes: After reading, with the heap trimmed.
        peak_bytes: While reading, including ``held_bytes``.
    """

    held_bytes: int
    peak_bytes: int


def tokenizer_memory(path: Path) -> TokenizerMemory:
    """Return the memory of a model directory's tokenizer; 0 without one."""
    file = path / "tokenizer.json"
    if file.is_file():
        keys, strings = _count(file)
        entries = keys if keys * _FEWEST_KEYS > strings else strings
        held = entries * _ENTRY_BYTES
        return TokenizerMemory(held, max(held, strings * _STRING_BYTES))
    others = (path / name for name in _OTHER_FILES)
    size = next((other.stat().st_size for other in others if other.is_file()), 0)
    return TokenizerMemory(size * _OTHER_FACTOR, size * _OTHER_PEAK_FACTOR)


def _count(file: Path) -> tuple[int, int]:
    """Return the number of keys and of strings in a JSON file, in 30 ms for 32 MiB."""
    keys = quotes = 0
    with file.open("rb") as data:
        while chunk := data.read(_CHUNK_BYTES):
            keys += chunk.count(b'":')
            quotes += chunk.count(b'"')
    return keys, quotes // 2
