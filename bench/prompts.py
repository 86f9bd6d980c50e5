"""Prompts with an exact number of tokens, each with a distinct first word."""

from __future__ import annotations

import random
import re
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer

from bench.records import Prompt

_WORD = re.compile("Ġ[a-z]{2,}")
_SOURCES = ("argparse.py", "textwrap.py", "queue.py", "csv.py", "shutil.py", "heapq.py")


class Prompts:
    """Deterministic generator of prompts for one model.

    Args:
        model: Model directory.
        seed: Seed of the word choice.
    """

    def __init__(self, model: Path, seed: int = 0) -> None:
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        vocabulary = self._tokenizer.get_vocab()
        words = (token.replace("Ġ", " ") for token in sorted(vocabulary) if _WORD.fullmatch(token))
        self._words = [word for word in words if len(self._encode(word)) == 1]
        self._random = random.Random(seed)
        self._beginnings: list[str] = []

    def words(self, count: int, beginning: Prompt | None = None) -> Prompt:
        """Return a prompt of ``count`` tokens.

        Args:
            count: Number of tokens, including the tokens of ``beginning``.
            beginning: Prefix of the prompt; by default a word that starts no other prompt.
        """
        missing = count - (len(beginning.token_ids) if beginning else 1)
        head = beginning.text if beginning else self._unique_word()
        text = head + "".join(self._random.choices(self._words, k=missing))
        prompt = Prompt(text, self._encode(text))
        if len(prompt.token_ids) != count:
            raise ValueError(f"a prompt of {count} words has {len(prompt.token_ids)} tokens")
        return prompt

    def source_code(self, count: int) -> list[Prompt]:
        """Return excerpts of Python's standard library, the demo model's training text."""
        folder = Path(sysconfig.get_path("stdlib"))
        return [self._of_file(folder / _SOURCES[i % len(_SOURCES)], i) for i in range(count)]

    def _of_file(self, path: Path, index: int) -> Prompt:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        begin = 100 + 40 * index
        text = "".join(lines[begin : begin + 12])
        return Prompt(text, self._encode(text))

    def _unique_word(self) -> str:
        if not self._beginnings:
            self._beginnings = self._random.sample(self._words, len(self._words))
        return self._beginnings.pop()

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text).ids)
